"""When what is known of a model is found again: its own loss, compiled parts, settings that keep changing."""

import pytest
import torch

from cggr_core.routing import findings
from cggr_core.routing.engine import Engine
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE


@pytest.fixture
def checked(monkeypatch):
    """Rows and lengths of the batches on which a model's own loss was checked."""
    sizes = []

    def check(model, architecture, inputs, labels, layer_output):
        sizes.append(tuple(inputs.shape))

    monkeypatch.setattr(findings, "check_loss_of_batch", check)
    return sizes


def check(engine, rows, length, **inputs):
    ids = tokens(rows, length)
    engine.check_own_loss(engine.inputs(input_ids=ids, **inputs), ids, ignore_index=-100)


def prepared(model):
    engine = Engine(model)
    engine.prepare(engine.inputs(input_ids=tokens(2, 8)), routing=False, own_loss=True)
    return engine


def test_every_nth_loss_is_checked_if_that_is_asked_for(checked, monkeypatch):
    monkeypatch.setenv("CGGR_VERIFY", "3")
    engine = prepared(ROUTABLE["llama"]())
    for _ in range(8):
        check(engine, 2, 8)
    assert len(checked) == 3, "batches 1, 4 and 7"
    check(engine, 2, 9)
    assert checked[3:] == [(2, 9)], "rows are longer"


def test_a_small_batch_that_is_checked_in_turn_makes_no_earlier_one_new(checked, monkeypatch):
    monkeypatch.setenv("CGGR_VERIFY", "2")
    engine = prepared(ROUTABLE["llama"]())
    for size in ((4, 8), (4, 8), (1, 3), (4, 8)):
        check(engine, *size)
    assert checked == [(4, 8), (1, 3)]
    for size in ((2, 2), (5, 8)):
        check(engine, *size)
    assert checked[2:] == [(2, 2), (5, 8)], "one in turn, one with more rows"


def test_ranks_that_shard_layers_check_a_loss_on_other_inputs_alone(checked, monkeypatch):
    monkeypatch.setattr(findings, "shards_layers", lambda layers: True)
    engine = prepared(ROUTABLE["llama"]())
    for size in ((2, 8), (3, 8), (2, 9)):
        check(engine, *size)
    assert checked == [(2, 8)], "the other ranks may have shorter batches"
    check(engine, 2, 4, attention_mask=torch.ones(2, 4))
    assert checked[1:] == [(2, 4)]


def test_a_model_is_searched_for_compiled_parts_once_for_each_structure(monkeypatch):
    searched, own = [], findings.check_not_compiled

    def search(model, layers):
        searched.append(type(model).__name__)
        own(model, layers)

    monkeypatch.setattr(findings, "check_not_compiled", search)
    engine = Engine(ROUTABLE["llama"]())
    inputs = engine.inputs(input_ids=tokens(2, 8))
    for _ in range(3):
        engine.prepare(inputs, routing=False)
    assert searched == ["LlamaForCausalLM"]
    engine.follow(ROUTABLE["gpt2"]())
    engine.prepare(inputs, routing=False)
    assert searched == ["LlamaForCausalLM", "GPT2LMHeadModel"]
    layer = engine.model.transformer.h[1]
    layer._compiled_call_impl = layer._call_impl  # what compile() sets, without its time
    for _ in range(2):
        with pytest.raises(ValueError, match="GPT2LMHeadModel was compiled"):
            engine.prepare(engine.inputs(input_ids=tokens(2, 8)), routing=False)


def test_a_setting_that_changes_in_every_step_is_no_reason_to_look_each_time():
    engine = Engine(ROUTABLE["llama"]())
    model, looked = engine.model, []
    with pytest.warns(UserWarning, match=r"^temperature of the model, its config or its loss keeps changing"):
        for step in range(1, 20):
            model.config.temperature = float(step)
            looked.append(engine.follow())
    assert [step for step, looks in enumerate(looked, 1) if looks] == [1, 2, 3, 4, 5, 6, 7, 8, 16]


@pytest.fixture
def looks(monkeypatch):
    """Which probes ran since the last call, and on rows of which length."""
    seen = []
    own = findings.probe

    def probe(model, architecture, inputs, **how):
        seen.append(("first", inputs.shape[1]))
        return own(model, architecture, inputs, **how)

    def whole(model, found, inputs):
        seen.append(("rows", inputs.shape[1]))
        return found

    def rare(model, found, inputs, *, sharded):
        seen.append(("rare", sharded))
        return found

    monkeypatch.setattr(findings, "probe", probe)
    monkeypatch.setattr(findings, "probe_whole_rows", whole)
    monkeypatch.setattr(findings, "probe_rare_tokens", rare)

    def of(engine, length=8, *, routing=True, embedded=False):
        seen.clear()
        given = {"inputs_embeds": torch.randn(2, length, 32)} if embedded else {"input_ids": tokens(2, length)}
        engine.prepare(engine.inputs(**given), routing=routing)
        return list(seen)

    return of


def with_own_code():
    model = ROUTABLE["llama"]()
    model.model.layers[1].register_forward_pre_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("sharded", [False, True])
def test_code_of_others_is_looked_at_on_rare_tokens_once_and_again_at_powers_of_two(sharded, looks, monkeypatch):
    monkeypatch.setattr(findings, "shards_layers", lambda layers: sharded)
    engine = Engine(with_own_code())
    assert looks(engine, routing=False) == [("first", 8)]
    found = [looks(engine) for _ in range(9)]
    assert found[0] == [("first", 8), ("rare", sharded)]
    again = [] if sharded else [("rows", 8)]
    assert found[1:] == [again, [], again, [], [], [], again, []]
    assert looks(engine, routing=False) == []
    assert looks(engine, 9) == ([] if sharded else [("rows", 9)])
    engine.follow(with_own_code())
    assert looks(engine) == [("first", 8), ("rare", sharded)], "another model"


def test_models_of_transformers_alone_are_looked_at_on_no_rare_tokens(looks):
    engine = Engine(ROUTABLE["llama"]())
    assert looks(engine) == [("first", 8)] and [looks(engine) for _ in range(4)] == [[]] * 4


def test_batches_without_token_ids_show_nothing_of_rare_tokens(looks):
    assert looks(Engine(with_own_code()), embedded=True) == [("first", 8)]
