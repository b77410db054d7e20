"""When an engine looks at its model, and which values its plain passes give."""

import dataclasses
import pickle
from contextlib import contextmanager

import pytest
import torch

from cggr_core import Selection
from cggr_core.routing import engine as engines
from cggr_core.routing import findings
from cggr_core.routing.context_pass import NO_CONTEXT
from cggr_core.routing.engine import Engine
from tests.support.model_steps import checkpoint_activations, tokens
from tests.support.tiny_models import ROUTABLE

LENGTH = 8


@pytest.fixture
def looks(monkeypatch):
    """Records whether every look covers routing and the model's own loss, and its tokens; fakes its results."""
    seen, found = [], {}

    def result(engine_or_probe):
        own = getattr(engine_or_probe, "architecture", engine_or_probe)
        head = dataclasses.replace(own.head, fused=found.get("fused", True))
        architecture = dataclasses.replace(own, head=head, obstacle=found.get("obstacle"))
        return findings.Probe(
            architecture, lambda hidden: hidden, found.get("packing"), found.get("saw_loss", False), has_loss=False
        )

    def probe(model, architecture, inputs, *, routing, own_loss):
        seen.append((routing, own_loss, inputs.shape[1]))
        return result(architecture)

    def probe_whole_rows(model, probe, inputs):
        seen.append(("longer", inputs.shape[1]))
        return result(probe)

    monkeypatch.setattr(findings, "probe", probe)
    monkeypatch.setattr(findings, "probe_whole_rows", probe_whole_rows)

    def since(prepare):
        before = len(seen)
        prepare()
        return seen[before:]

    since.found = found
    return since


def preparing(engine, length=LENGTH, packed=False, **how):
    position_ids = torch.tensor([[*range(3), *range(length - 3)]]).expand(2, -1) if packed else None
    inputs = engine.inputs(input_ids=tokens(length=length)[:2], position_ids=position_ids)
    assert (inputs.segment is not None) is packed
    return lambda: engine.prepare(inputs, **{"routing": True, **how})


def test_what_is_looked_at_once_is_not_looked_at_again(looks):
    engine = Engine(ROUTABLE["llama"]())
    assert looks(preparing(engine, routing=False)) == [(False, False, 8)]
    assert looks(preparing(engine, routing=False)) == []
    assert looks(preparing(engine, routing=False, length=20)) == [], "rows matter to routing alone"
    assert looks(preparing(engine, routing=False, packed=True)) == [], "and so does packing"
    assert looks(preparing(engine)) == [(True, False, 8)]
    assert looks(preparing(engine)) == looks(preparing(engine, length=5)) == []
    assert looks(preparing(engine, length=9)) == [("longer", 9)]
    assert looks(preparing(engine, length=9)) == looks(preparing(engine, length=8)) == []
    assert looks(preparing(engine, packed=True)) == [(True, False, 8)]
    assert looks(preparing(engine, packed=True)) == looks(preparing(engine, length=9)) == []
    assert looks(preparing(engine, routing=False, length=30)) == []


def test_a_longer_batch_that_is_looked_at_anew_counts_as_long(looks):
    engine = Engine(ROUTABLE["llama"]())
    looks(preparing(engine, length=20))
    assert looks(preparing(engine, length=10, packed=True)) == [(True, False, 10)]
    assert looks(preparing(engine, length=20)) == []


def test_rows_count_as_looked_at_where_they_were_routed(looks):
    engine = Engine(ROUTABLE["llama"]())
    assert looks(preparing(engine, routing=False, length=20)) == [(False, False, 20)]
    assert looks(preparing(engine, length=10)) == [(True, False, 10)]
    assert looks(preparing(engine, length=20)) == [("longer", 20)]


def test_every_look_is_seen_by_whoever_holds_something_of_the_last(looks):
    """Recordings hold results of the last look; ``seen`` changes with the look itself, before the next batch."""
    engine = Engine(ROUTABLE["llama"]())
    seen = [engine.seen]
    for change in (
        preparing(engine, routing=False),
        preparing(engine),
        preparing(engine, packed=True),
        lambda: engine.follow(ROUTABLE["llama"]()),
        lambda: engine.model.load_state_dict(engine.model.state_dict()),
    ):
        change()
        seen.append(engine.seen)
    assert len(set(seen)) == len(seen)


def test_what_a_batch_did_not_have_before_is_looked_at(looks):
    engine, ids = Engine(ROUTABLE["llama"]()), tokens(length=LENGTH)[:2]
    given = {
        "attention_mask": torch.ones(2, LENGTH),
        "position_ids": torch.arange(LENGTH)[None],
        "output_router_logits": None,
    }

    def of(length=LENGTH, **inputs):
        inputs = {"input_ids": ids, **inputs}
        cut = {name: value if value is None else value[:, :length] for name, value in inputs.items()}
        return looks(lambda: engine.prepare(engine.inputs(**cut), routing=True))

    assert of() == [(True, False, 8)]
    # Position ids without a mask may say that rows are packed.
    for name, look in (("attention_mask", ("longer", 8)), ("position_ids", (True, False, 8))):
        assert of(**{name: given[name]}) == [look]
        assert of(**{name: given[name]}) == of(length=5, **{name: given[name]}) == []
    assert of(**given) == [("longer", 8)]
    assert of(input_ids=None, inputs_embeds=torch.randn(2, LENGTH, 32), length=5) == [("longer", 5)]
    assert of(input_ids=None, inputs_embeds=torch.randn(2, LENGTH, 32)) == [("longer", 8)]
    assert of() == of(**given) == []
    assert of(length=1, output_router_logits=None, attention_mask=given["attention_mask"]) == []
    assert of(token_type_ids=torch.zeros(2, LENGTH, dtype=torch.int64), length=1) == [("longer", 1)]


def test_a_loss_is_looked_at_until_it_was_seen(looks):
    engine = Engine(ROUTABLE["llama"]())
    for _ in range(2):
        assert looks(preparing(engine, own_loss=True)) == [(True, True, 8)]
    looks.found["saw_loss"] = True
    assert looks(preparing(engine, own_loss=True)) == [(True, True, 8)]
    assert looks(preparing(engine, own_loss=True)) == []


def test_loaded_weights_and_other_modules_are_looked_at(looks):
    engine = Engine(ROUTABLE["llama"]())
    looks(preparing(engine))
    before = engine.seen
    assert engine.follow() is False and engine.seen == before
    engine.model.load_state_dict(engine.model.state_dict())
    assert engine.seen != before
    for expected in ([(True, False, 8)], []):
        assert looks(preparing(engine)) == expected
    before = engine.seen
    engine.model.resize_token_embeddings(200)
    # Whoever makes inputs has the model as it is.
    assert looks(preparing(engine)) == [(True, False, 8)]
    assert engine.seen != before and engine.vocab_size == 200
    other = ROUTABLE["llama"]()
    assert engine.follow(other) is True
    assert engine.model is other and engine.follow(other) is False
    assert looks(preparing(engine)) == [(True, False, 8)]
    copy = pickle.loads(pickle.dumps(engine))
    assert looks(preparing(copy)) == [(True, False, 8)]


def test_ranks_that_shard_layers_do_not_look_at_longer_rows(looks, monkeypatch):
    monkeypatch.setattr(findings, "shards_layers", lambda layers: True)
    engine = Engine(ROUTABLE["llama"]())
    assert looks(preparing(engine)) == [(True, False, 8)]
    assert looks(preparing(engine, length=20)) == []


def test_what_cannot_be_routed_is_refused_each_time(looks):
    engine = Engine(ROUTABLE["llama"]())
    looks.found["packing"] = "not packed"
    preparing(engine)()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^not packed$"):
            preparing(engine, packed=True)()
    preparing(engine)()
    looks.found["obstacle"] = "it does not"
    engine.follow(ROUTABLE["llama"]())
    preparing(engine, routing=False)()
    for _ in range(2):
        with pytest.raises(ValueError, match="route keys and values, but it does not; use gradient='exact'"):
            preparing(engine)()
    assert looks(preparing(engine, routing=False)) == []


def test_a_head_that_is_more_than_a_matrix_is_said_once(looks):
    engine = Engine(ROUTABLE["llama"]())
    looks.found["fused"] = False
    preparing(engine, applies_head=False)()
    engine.follow(ROUTABLE["llama"]())
    with pytest.warns(UserWarning, match="the head of LlamaForCausalLM is more than one matrix"):
        preparing(engine)()
    assert looks(preparing(engine)) == []


def test_a_setting_of_one_rank_is_no_reason_to_look_where_layers_are_sharded(monkeypatch):
    """Other ranks would not look in the same step; what is changed of the modules is changed on all."""
    engine = Engine(ROUTABLE["llama"]())
    monkeypatch.setattr(findings, "shards_layers", lambda layers: True)
    engine.model.config.rms_norm_eps = 0.5
    assert engine.follow() is False
    monkeypatch.undo()
    engine.model.config.rms_norm_eps = 0.25
    assert engine.follow() is True


@pytest.mark.parametrize("look", ["probe", "probe_whole_rows", "check_reads", "check_loss_of_batch"])
def test_a_look_leaves_no_trace(look, monkeypatch):
    """Of the random numbers that it draws and the buffers that it counts in."""
    model, own, ran = ROUTABLE["llama"](), getattr(findings, look), []
    model.register_buffer("seen", torch.zeros(1))

    def noisy(given, *args, **how):
        torch.rand(3)
        model.seen += 1
        ran.append(look)
        return own(given, *args, **how)

    monkeypatch.setattr(findings, look, noisy)
    engine, ids = Engine(model), tokens(length=LENGTH)[:2]
    state = torch.get_rng_state()
    for length in (LENGTH - 2, LENGTH):
        inputs = engine.inputs(input_ids=ids[:, :length])
        engine.prepare(inputs, routing=True, own_loss=True)
        engine.check_reads("num_items_in_batch", inputs)
        engine.check_own_loss(inputs, ids[:, :length], ignore_index=-100)
    assert ran and model.seen == 0 and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_values_of_a_plain_pass(name):
    model = ROUTABLE[name]().eval()
    engine = Engine(model)
    given = {"input_ids": tokens(length=LENGTH)[:2]}
    engine.prepare(engine.inputs(**given), routing=False)
    wanted = model(**given, output_hidden_states=True)
    head = model.get_output_embeddings()
    positions = torch.tensor([[0, 3, 7], [1, 2, 5]])
    for hidden in (False, True):
        values, auxiliary = engine.plain(given, hidden=hidden)
        assert auxiliary is None
        torch.testing.assert_close(head(values), wanted.logits)
        some, _ = engine.plain(given, hidden=hidden, positions=positions)
        torch.testing.assert_close(some, values.gather(1, positions[:, :, None].expand(-1, -1, values.shape[2])))
    for depth in (engine.depth, engine.depth + 1, None):
        torch.testing.assert_close(engine.logits(given, depth=depth), wanted.logits)
    shallow = engine.logits(given, depth=1)
    assert not torch.allclose(shallow, wanted.logits)
    torch.testing.assert_close(head(engine.plain(given, depth=1)[0]), shallow)
    torch.testing.assert_close(engine.hidden(given, depth=1), wanted.hidden_states[1])
    with engine.hidden_states(1) as seen:
        model(**given)
    model(**given)
    assert len(seen) == 1 and not seen[0].requires_grad
    torch.testing.assert_close(seen[0], wanted.hidden_states[1])
    # Left alone, the model is as it was.
    torch.testing.assert_close(model(**given).logits, wanted.logits)


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
def test_values_of_every_pass_with_a_head_of_its_own():
    """The logits, or the head's input if requested."""
    model = ROUTABLE["llama"]().eval()
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 24), torch.nn.GELU(), torch.nn.Linear(24, 97))
    engine = Engine(model)
    given = {"input_ids": tokens(length=LENGTH)[:2]}
    inputs = engine.inputs(**given)
    engine.prepare(inputs, routing=True)
    assert not engine.architecture.head.fused
    wanted = {True: model.model(**given).last_hidden_state, False: model(**given).logits}
    index = torch.tensor([[0, 3, 7], [1, 2, 5]])
    mask = torch.zeros(2, LENGTH, dtype=torch.bool).scatter_(1, index, True)
    kept = Selection.from_mask(mask, countable=torch.ones_like(mask), capacity=3)
    for hidden, values in wanted.items():
        torch.testing.assert_close(engine.plain(given, hidden=hidden)[0], values)
        context, found = engine.context(inputs, depth=engine.depth, keep_graph=False, head=True, hidden=hidden)
        torch.testing.assert_close(found, values)
        found, _ = engine.gradient(inputs, kept, context, keep_graph=False, hidden=hidden)
        torch.testing.assert_close(found, values.gather(1, index[:, :, None].expand(-1, -1, values.shape[2])))
    assert engine.context(inputs, depth=engine.depth, keep_graph=False, head=False)[1] is None


def test_padding_counts_in_a_plain_pass():
    model = ROUTABLE["llama"]().eval()
    engine = Engine(model)
    given = {"input_ids": tokens(length=LENGTH)[:2], "attention_mask": torch.ones(2, LENGTH, dtype=torch.int64)}
    given["attention_mask"][:, :3] = 0
    wanted = model(**given).logits[:, 3:]
    torch.testing.assert_close(engine.logits(given)[:, 3:], wanted)
    packed = {"input_ids": given["input_ids"], "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]] * 2)}
    torch.testing.assert_close(engine.logits(packed), model(**packed, use_cache=False).logits)


def test_what_a_graph_cannot_capture_is_left_out(monkeypatch):
    """Host reads of masks and positions, and restoring a random state."""
    engine, ids = Engine(ROUTABLE["llama"]().eval()), tokens(length=LENGTH)[:2]
    inputs = engine.inputs(input_ids=ids)
    engine.prepare(inputs, routing=True)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, ::3] = True
    kept = Selection.from_mask(mask, countable=torch.ones_like(mask), capacity=3)
    noted = []

    @contextmanager
    def block(name):
        noted.append(name)
        yield

    def gradient_pass(*args, preserve_rng_state, run=engines.gradient_pass, **how):
        noted.append(preserve_rng_state)
        return run(*args, preserve_rng_state=preserve_rng_state, **how)

    monkeypatch.setattr(engines, "unseen_masks", lambda: block("unseen"))
    monkeypatch.setattr(engines, "whole_rows", lambda architecture: block("whole"))
    monkeypatch.setattr(engines, "without_random_states", lambda architecture: block("no states"))
    monkeypatch.setattr(engines, "gradient_pass", gradient_pass)

    def passes():
        noted.clear()
        engine.logits({"input_ids": ids, "attention_mask": None, "position_ids": None})
        engine.logits({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        engine.logits({"input_ids": ids, "position_ids": torch.arange(LENGTH)[None]})
        engine.gradient(inputs, kept, NO_CONTEXT, keep_graph=True)
        return noted

    assert passes() == ["whole", True]
    with pytest.raises(RuntimeError, match="inside"), engine.capturable():
        assert passes() == ["whole", "no states", *["unseen", "no states"] * 2, False]
        raise RuntimeError("inside")
    assert passes() == ["whole", True]


def test_whether_a_loss_reads_an_argument_is_seen_once(monkeypatch):
    engine, seen = Engine(ROUTABLE["llama"]()), []

    def check(name, model, architecture, inputs):
        seen.append(name)
        if len(seen) == 1:
            raise ValueError("not read")

    monkeypatch.setattr(findings, "check_reads", check)
    inputs = engine.inputs(input_ids=tokens(length=LENGTH)[:2])
    engine.prepare(inputs, routing=False)
    with pytest.raises(ValueError, match="not read"):
        engine.check_reads("shift_labels", inputs)
    for name in ("shift_labels", "num_items_in_batch") * 2:
        engine.check_reads(name, inputs)
    assert seen == ["shift_labels"] * 2, "no loss of the model's own was seen that could be divided"
    engine.prepare(inputs, routing=False, own_loss=True)
    for name in ("shift_labels", "num_items_in_batch") * 2:
        engine.check_reads(name, inputs)
    assert seen == ["shift_labels", "shift_labels", "num_items_in_batch"]
    engine.follow(ROUTABLE["llama"]())
    engine.prepare(inputs, routing=False)
    engine.check_reads("shift_labels", inputs)
    assert len(seen) == 4


def test_labels_that_a_whole_batch_is_looked_at_with(monkeypatch):
    """Only batches with more rows, longer rows or other inputs; labels outside the vocabulary are left out."""
    engine, seen = Engine(ROUTABLE["llama"]()), []

    def check(model, architecture, inputs, labels, layer_output):
        seen.append(labels)

    monkeypatch.setattr(findings, "check_loss_of_batch", check)

    def held(rows=2, length=LENGTH, **given):
        ids = tokens(length=LENGTH)[:rows, :length]
        inputs = engine.inputs(input_ids=ids, **given)
        before = len(seen)
        engine.check_own_loss(inputs, ids, ignore_index=5)
        return len(seen) - before

    assert held() == 0, "not before the loss was seen"
    engine.prepare(engine.inputs(input_ids=tokens(length=LENGTH)[:2]), routing=False)
    assert held() == 0
    engine.prepare(engine.inputs(input_ids=tokens(length=LENGTH)[:2]), routing=False, own_loss=True)
    assert [held(), held(), held(1), held(1, 5)] == [1, 0, 0, 0]
    assert [held(3, 5), held(3), held(2)] == [1, 0, 0]
    assert [held(2, 4, attention_mask=torch.ones(2, 4)), held(2, 5, attention_mask=torch.ones(2, 5))] == [1, 1]
    labels = torch.tensor([[5, -100, -1, 0, 96, 97, 98, 7]])
    engine.check_own_loss(engine.inputs(inputs_embeds=torch.randn(1, LENGTH, 32)), labels, ignore_index=5)
    assert seen[-1].tolist() == [[-100, -100, -100, 0, 96, -100, -100, 7]]
    monkeypatch.setattr(findings, "shards_layers", lambda layers: True)
    assert held(4) == 0 and held(1, 2, position_ids=torch.zeros(1, 2, dtype=torch.int64)) == 1


def test_checkpointing_that_keeps_random_states():
    model = ROUTABLE["llama"]().train()
    engine = Engine(model)
    assert not engine.keeps_random_states
    checkpoint_activations(model)
    assert not engine.keeps_random_states
    layer = model.model.layers[1]
    layer._gradient_checkpointing_func = lambda run, *args: run(*args)
    assert engine.keeps_random_states
    layer.gradient_checkpointing = False
    assert not engine.keeps_random_states


def test_inputs_have_everything_that_was_given():
    engine = Engine(ROUTABLE["llama"]())
    types = torch.ones(2, LENGTH, dtype=torch.int64)
    made = engine.inputs(input_ids=tokens(length=LENGTH)[:2], token_type_ids=types, output_attentions=True)
    assert made.per_token["token_type_ids"] is types and made.options == {"output_attentions": True}
    embedded = engine.embeddings(tokens(length=LENGTH)[:2])
    assert embedded.shape == (2, LENGTH, engine.hidden_size) and not embedded.requires_grad
    assert engine.embedding_size == engine.hidden_size == engine.model.config.hidden_size
    projected = Engine(ROUTABLE["opt"]())  # from its embeddings to its layers
    assert (projected.embedding_size, projected.hidden_size) == (16, 32)
