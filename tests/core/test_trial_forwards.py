"""Probes of a model: what they run it on, what they find, and their errors."""

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from cggr_core.routing.engine import Engine
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.probe import Probe, probe, probe_whole_rows
from tests.support.tiny_models import ROUTABLE, VOCAB

ROWS, LENGTH = 4, 12


def tokens(rows: int = ROWS, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def look(model: nn.Module, *, routing: bool = True, own_loss: bool = False, **given: Any) -> tuple[Probe, TokenInputs]:
    engine = Engine(model)
    inputs = engine.inputs(**(given or {"input_ids": tokens()}))
    return probe(model, engine.architecture, inputs, routing=routing, own_loss=own_loss), inputs


@pytest.fixture
def given(monkeypatch) -> list[dict[str, Any]]:
    """The arguments of every forward of a Llama, and whether it was in training mode."""
    seen = []
    own = transformers.LlamaForCausalLM.forward

    @functools.wraps(own)
    def forward(self, *args, **kwargs):
        seen.append({**kwargs, "training": self.training, "grad": torch.is_grad_enabled()})
        return own(self, *args, **kwargs)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    return seen


def test_first_a_few_tokens_of_text_in_evaluation_mode_then_whole_rows_as_they_are(given):
    model, input_ids = ROUTABLE["llama"]().train(), tokens()
    mask = torch.ones_like(input_ids)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0) + 7
    found, _ = look(model, input_ids=input_ids, attention_mask=mask, position_ids=positions)
    assert found.architecture.obstacle is None and found.architecture.head.fused
    first = given[0]
    assert first["input_ids"].equal(input_ids[:2, :8]) and not first["training"]
    # The first row's padding counts as text, at consecutive positions from its first on.
    assert first["attention_mask"].equal(torch.ones(2, 8, dtype=torch.int64))
    assert first["position_ids"].equal(torch.arange(7, 15).expand(2, -1))
    assert first["use_cache"] is False
    of_whole_rows = [call for call in given if call["input_ids"].shape[1] == LENGTH]
    assert all(call["input_ids"].equal(input_ids[:2]) and call["training"] for call in of_whole_rows)
    assert all(call["position_ids"].equal(positions[:2]) for call in of_whole_rows)
    assert all(call["attention_mask"].equal(mask[:2]) for call in of_whole_rows)
    # A plain forward, once more to see that it gives the same again, and three routed passes, one of them after a
    # context pass.
    assert len(of_whole_rows) == 6
    assert not model.model.norm.weight.grad and model.training
    assert all(call["training"] for call in given[len(given) - 6 :])


def test_without_routing_only_a_few_tokens_are_run(given):
    found, _ = look(ROUTABLE["llama"]().train(), routing=False)
    assert found.architecture.fused == {}
    assert [tuple(call["input_ids"].shape) for call in given] == [(2, 8)] * len(given)
    assert {call["training"] for call in given} == {True, False}, "some heads change their logits in training alone"


def test_a_mask_is_not_made_where_none_was_given(given):
    look(ROUTABLE["llama"](), input_ids=tokens(1, 5))
    assert [call["input_ids"].shape[1] for call in given] == [5] * len(given)
    assert not any("attention_mask" in call or "position_ids" in call for call in given)


def test_the_models_own_loss_is_seen_where_rows_have_a_label_to_predict(given):
    model = ROUTABLE["llama"]()
    assert look(model, own_loss=True)[0].saw_loss is True
    assert any("labels" in call for call in given)
    given.clear()
    assert look(model)[0].saw_loss is False
    assert not any("labels" in call for call in given)
    assert look(model, own_loss=True, input_ids=tokens(2, 1))[0].saw_loss is False


class WithOptions(transformers.LlamaForCausalLM):
    """Takes inputs for every row, and records their numbers of rows."""

    def forward(self, *args, by_row=None, by_row_or_one=None, scale=None, **kwargs):
        self.seen.append({"by_row": by_row, "by_row_or_one": by_row_or_one, "scale": scale, **kwargs})
        return super().forward(*args, **kwargs)


def with_options() -> transformers.LlamaForCausalLM:
    model = ROUTABLE["llama"]()
    model.__class__ = WithOptions
    model.__dict__["seen"] = []
    return model


def test_what_goes_with_the_rows_is_cut_with_them():
    model = with_options()
    options = {"by_row": torch.arange(ROWS), "by_row_or_one": torch.ones(1, 3), "scale": torch.tensor(2.0)}
    look(model, input_ids=tokens(), **options)
    few, *_, whole = model.seen
    assert few["by_row"] is few["by_row_or_one"] is few["scale"] is None, "text alone"
    assert whole["input_ids"].shape[0] == 2
    assert whole["by_row"].tolist() == [0, 1] and whole["by_row_or_one"].shape == (1, 3) and whole["scale"] == 2


@pytest.mark.parametrize(("rows", "images"), [(4, 3), (4, 6), (2, 3)])
def test_rows_are_not_cut_where_something_is_counted_otherwise(rows, images):
    model = with_options()
    look(model, input_ids=tokens(rows), by_row=torch.arange(images))
    whole = model.seen[-1]
    assert whole["input_ids"].equal(tokens(rows)) and whole["by_row"].equal(torch.arange(images))


def test_two_rows_of_a_packed_batch(given):
    positions = torch.tensor([[*range(5), *range(7)], [*range(3), *range(9)], [*range(12)], [*range(12)]])
    model = ROUTABLE["llama"]()
    found, inputs = look(model, input_ids=tokens(), position_ids=positions)
    assert found.packing_obstacle is None and found.architecture.obstacle is None
    assert given[-1]["position_ids"].equal(positions[:2])
    again = probe_whole_rows(model, found, inputs)
    assert again.packing_obstacle is None and again.architecture.obstacle is None


def test_a_model_that_attends_across_documents_may_still_be_routed():
    positions = torch.tensor([[*range(5), *range(7)]]).expand(ROWS, -1)
    model = ROUTABLE["bloom"]()
    found, inputs = look(model, input_ids=tokens(), position_ids=positions)
    assert found.architecture.obstacle is None
    assert "BloomForCausalLM attends across packed documents" in found.packing_obstacle
    whole = Engine(model).inputs(input_ids=tokens())
    again = probe_whole_rows(model, found, whole)
    assert again.packing_obstacle == found.packing_obstacle, "what was seen once holds"
    assert inputs.segment is not None and whole.segment is None


def test_what_was_refused_is_not_run_again(given):
    model = ROUTABLE["llama"]()
    model.model.layerdrop = 0.25
    found, inputs = look(model)
    assert found.architecture.obstacle == (
        "LlamaForCausalLM drops random layers in training (layerdrop=0.25), different ones in every pass; set "
        "layerdrop to 0 before wrapping"
    )
    assert all(call["input_ids"].shape[1] == 8 for call in given), "no routed pass"
    given.clear()
    assert probe_whole_rows(model, found, inputs) is found and given == []
    assert look(model, routing=False)[0].architecture.obstacle is None


def test_placeholders_of_images_are_other_tokens_in_a_trial_of_text(given):
    model, input_ids = ROUTABLE["llama"](), tokens()
    model.config.image_token_id = int(input_ids[0, 2])
    look(model, input_ids=input_ids, routing=False)
    others = input_ids[:2, :8] != model.config.image_token_id
    assert not others[0, 2]
    for call in given:
        assert (call["input_ids"] != model.config.image_token_id).all()
        assert call["input_ids"][others].equal(input_ids[:2, :8][others])


def test_embeddings_in_place_of_tokens(given):
    embeds = torch.randn(ROWS, LENGTH, 32, generator=torch.Generator().manual_seed(1))
    assert look(ROUTABLE["llama"](), own_loss=True, inputs_embeds=embeds)[0].architecture.obstacle is None
    assert given[0]["inputs_embeds"].equal(embeds[:2, :8])


def test_documents_that_mix_once_a_model_has_learned_to():
    """Attention whose output is multiplied by 0 at first."""
    positions = torch.tensor([[*range(5), *range(7)]]).expand(ROWS, -1)
    model = ROUTABLE["bloom"]()
    for layer in model.transformer.h:
        nn.init.zeros_(layer.self_attention.dense.weight)
    found, packed = look(model, input_ids=tokens(), position_ids=positions)
    assert found.architecture.obstacle is None and "attends across" in found.packing_obstacle
    unpacked, _ = look(model, input_ids=tokens())
    assert unpacked.packing_obstacle is None
    assert probe_whole_rows(model, unpacked, packed).packing_obstacle == found.packing_obstacle
    assert not any(layer.self_attention.dense.weight.any() for layer in model.transformer.h)


class Lengths(transformers.LlamaForCausalLM):
    """Runs on rows of ``multiple`` tokens alone."""

    multiple = LENGTH

    def forward(self, input_ids=None, **kwargs):
        if input_ids.shape[1] % self.multiple:
            raise ValueError(f"{input_ids.shape[1]} tokens")
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize(("multiple", "length", "said"), [(LENGTH, 12, None), (5, 12, "8 tokens"), (5, 7, "7 tokens")])
def test_some_models_run_on_rows_of_certain_lengths_alone(multiple, length, said):
    model = ROUTABLE["llama"]()
    model.__class__ = type("Own", (Lengths,), {"multiple": multiple})
    if said is None:
        assert look(model, own_loss=True, input_ids=tokens(2, length))[0].architecture.obstacle is None
    else:
        with pytest.raises(ValueError, match=f"^{said}$"):
            look(model, input_ids=tokens(2, length))


class Replaced(transformers.LlamaForCausalLM):
    """Returns something other than its logits."""

    def forward(self, *args, **kwargs):
        return self.change(super().forward(*args, **kwargs))


def replaced(change) -> transformers.LlamaForCausalLM:
    model = ROUTABLE["llama"]()
    model.__class__ = Replaced
    model.__dict__["change"] = change
    return model


def some_nan(output):
    output.logits[0, 3, 5] = output.logits[1, 7] = torch.nan
    return output


def test_nan_is_counted():
    with pytest.raises(ValueError, match=r"^logits are NaN at 2 of the first 16 positions of a trial forward; look"):
        look(replaced(some_nan))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda out: CausalLMOutput(logits=out.logits[:, 2:]), r"returned logits \[2, 6, 97\] for \[2, 8\] tokens"),
        (lambda out: CausalLMOutput(logits=out.logits[:1]), r"returned logits \[1, 8, 97\] for \[2, 8\] tokens"),
        (lambda out: {"scores": out.logits, "more": 1}, r"no logits \(its output has scores, more\)"),
    ],
)
def test_outputs_that_are_not_logits_for_each_token_are_refused(change, said):
    with pytest.raises(ValueError, match=said):
        look(replaced(change))


def times(factor: float, *, tokens: int = 8):
    """Logits of the first tokens of each row that are multiplied after the head."""

    def change(output):
        output.logits = torch.cat([output.logits[:, :tokens] * factor, output.logits[:, tokens:]], dim=1)
        return output

    return change


def ruled_out(output):
    output.logits = output.logits.index_fill(2, torch.tensor([5]), -torch.inf)
    return output


@pytest.mark.parametrize(
    ("change", "dtype", "fused"),
    [
        (times(1.0), torch.float32, True),
        (times(1.005), torch.float32, True),
        (times(1.02), torch.float32, False),
        (times(1.02, tokens=1), torch.float32, True),  # fewer than a quarter of the tokens
        (times(1.02, tokens=3), torch.float32, False),
        (times(1.00001), torch.float64, False),
        (times(1.03), torch.bfloat16, True),
        (times(1.08), torch.bfloat16, False),
        (ruled_out, torch.float32, False),
    ],
)
def test_logits_are_compared_where_a_head_is_sharded(change, dtype, fused, monkeypatch):
    """What follows such a head cannot be tested with replaced logits."""
    monkeypatch.setattr("cggr_core.routing.probe.gives_the_logits", lambda model, architecture, inputs: True)
    found, _ = look(replaced(change).to(dtype), routing=False)
    assert found.architecture.head.fused is fused


@pytest.mark.parametrize("name", ["granite", "cohere", "gptj", "gemma2"])
def test_scales_softcaps_and_biases_belong_to_a_head_that_is_sharded_too(name, monkeypatch):
    monkeypatch.setattr("cggr_core.routing.probe.gives_the_logits", lambda model, architecture, inputs: True)
    assert look(ROUTABLE[name](), routing=False)[0].architecture.head.fused is True


def test_hidden_states_are_wrapped_as_layers_return_them():
    hidden = torch.randn(2, 3, 4)
    assert look(ROUTABLE["llama"]())[0].layer_output(hidden) is hidden
    model = ROUTABLE["bloom"]()
    returned = []
    hook = model.transformer.h[0].register_forward_hook(lambda module, args, output: returned.append(output))
    model(tokens(1, 2))
    hook.remove()
    wrapped = look(model)[0].layer_output(hidden)
    assert isinstance(returned[0], tuple) and len(wrapped) == len(returned[0])
    assert wrapped[0] is hidden and set(wrapped[1:]) <= {None}


def test_a_head_whose_weight_is_read_without_a_call_cannot_be_routed():
    model = ROUTABLE["llama"]()
    head = model.lm_head
    head.forward = lambda hidden: nn.functional.linear(hidden, head.weight)
    assert look(model)[0].architecture.obstacle is None
    model.forward = lambda *args, **kwargs: CausalLMOutput(
        logits=nn.functional.linear(model.model(*args, **kwargs).last_hidden_state, head.weight)
    )
    found, _ = look(model)
    assert found.architecture.obstacle == "LlamaForCausalLM uses the weight of its head without calling the head"
    assert found.architecture.head.fused is False


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_that_computes_something_else_with_gradients_is_no_layer_to_be_routed(training):
    model = ROUTABLE["llama"]().train(training)
    model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, output: output * 1.01 if torch.is_grad_enabled() else output
    )
    found = look(model)[0].architecture.obstacle
    assert found is not None
    assert found.startswith("LlamaForCausalLM computes other values with gradients enabled than without (relative err")
    assert look(model, routing=False)[0].architecture.obstacle is None
