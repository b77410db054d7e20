"""Gradient routing equals an autograd reference, for every architecture, mode and engine."""

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from cggr_core import CGGRModel, Selection, create_truncated_router
from cggr_core.routing import masks
from tests.support.exact_steps import (
    A_FEW,
    BATCH,
    LENGTH,
    aligned,
    assert_equal,
    batch,
    partly_labelled,
    random_selection,
    reference,
)
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, UNROUTABLE, VOCAB

ENGINES = ("interleaved", "two_pass")


def routed(model, labels, selection, *, gradient, engine, **inputs):
    wrapped = CGGRModel(model, gradient=gradient, engine=engine, selection="random")
    loss = wrapped(labels=labels, selection=selection, **inputs)
    loss.backward()
    assert wrapped.metrics["engine"] == engine
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("gradient", ["kv", "detached"])
@pytest.mark.parametrize("name", ROUTABLE)
def test_equals_the_autograd_reference(name, gradient):
    model, (input_ids, labels) = ROUTABLE[name](), partly_labelled()
    selection = random_selection(aligned(model, labels).countable)
    wanted = reference(model, labels, selection, gradient=gradient, input_ids=input_ids)
    for engine in ENGINES:
        assert_equal(routed(model, labels, selection, gradient=gradient, engine=engine, input_ids=input_ids), wanted)


class FeedForwardFirst(LlamaDecoderLayer):
    """A layer that computes on its hidden states before their keys and values."""

    def forward(self, hidden_states, **options):
        hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        attended = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **options)[0]
        return hidden_states + attended


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("gradient", ["kv", "detached"])
def test_layers_that_compute_before_their_attention(gradient, engine):
    """What comes before the keys and values of other tokens has the gradient that reaches it within its layer."""
    model, labels = ROUTABLE["llama"](), batch()
    for layer in model.model.layers:
        layer.__class__ = FeedForwardFirst
    selection = random_selection(aligned(model, labels).countable)
    given = {"gradient": gradient, "input_ids": labels}
    assert_equal(routed(model, labels, selection, engine=engine, **given), reference(model, labels, selection, **given))


@pytest.mark.parametrize("gradient", ["kv", "detached"])
def test_slots_for_all_tokens_of_which_some_hold_none(gradient):
    model, input_ids = ROUTABLE["llama"](), batch()
    kept = random_selection(aligned(model, input_ids).countable)
    weight = torch.zeros(input_ids.shape).scatter_(1, kept.index, kept.weight)
    countable = aligned(model, input_ids).countable
    selection = Selection.from_mask(kept.mask, weight=weight, countable=countable, capacity=LENGTH)
    assert selection.index.shape[1] == LENGTH and not selection.valid.all()
    wanted = reference(model, input_ids, kept, gradient=gradient, input_ids=input_ids)
    for engine in ENGINES:
        assert_equal(routed(model, input_ids, selection, gradient=gradient, engine=engine, input_ids=input_ids), wanted)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ROUTABLE)
def test_padded_rows(name, side):
    model, input_ids = ROUTABLE[name](), batch()
    attention_mask = torch.ones_like(input_ids)
    padding = slice(0, 4) if side == "left" else slice(LENGTH - 4, LENGTH)
    attention_mask[1, padding] = 0
    input_ids[1, padding] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    selection = random_selection(aligned(model, labels).countable)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    wanted = reference(model, labels, selection, gradient="kv", **inputs)
    for engine in ENGINES:
        assert_equal(routed(model, labels, selection, gradient="kv", engine=engine, **inputs), wanted)


PACKED = torch.tensor([[*range(6), *range(7)], [*range(3), *range(8), *range(2)]])


@torch.no_grad()
def attends_across_documents(model) -> bool:
    """Whether transformers' own forward attends across packed documents, which depends on model and version."""
    input_ids, changed = batch(), batch()
    changed[:, 0] = 3 + (changed[:, 0] - 2) % (VOCAB - 3)
    first, second = (
        model(input_ids=ids, position_ids=PACKED, use_cache=False).logits[0, 6:] for ids in (input_ids, changed)
    )
    return not torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("name", ROUTABLE)
def test_packed_rows(name):
    model, input_ids = ROUTABLE[name](), batch()
    labels = input_ids.masked_fill(PACKED == 0, -100)
    inputs = {"input_ids": input_ids, "position_ids": PACKED}
    if attends_across_documents(model):
        with pytest.raises(ValueError, match="attends across packed documents"):
            CGGRModel(model)(labels=labels, **inputs)
        return
    selection = random_selection(aligned(model, labels).countable)
    wanted = reference(model, labels, selection, gradient="kv", **inputs)
    for engine in ENGINES:
        assert_equal(routed(model, labels, selection, gradient="kv", engine=engine, **inputs), wanted)


def test_whether_documents_are_kept_apart_is_seen():
    """The two outcomes of the test above, for models on which all supported versions agree."""
    assert not attends_across_documents(ROUTABLE["llama"]())
    assert attends_across_documents(ROUTABLE["bloom"]())


class HandsOn(LlamaForCausalLM):
    """A forward that names none of its arguments."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("gradient", ["kv", "detached"])
def test_position_ids_reach_a_forward_that_does_not_name_them(gradient):
    model, input_ids = ROUTABLE["llama"](), batch()
    with torch.no_grad():
        for layer in model.model.layers:  # so that positions count
            layer.self_attn.q_proj.weight.mul_(20)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        without = model(**inputs).logits
        inputs["position_ids"] = (torch.arange(LENGTH) * 5 % 11).expand(BATCH, -1)
        assert relative_error({"": model(**inputs).logits}, {"": without}) > 0.05
    model.__class__ = HandsOn
    selection = random_selection(aligned(model, input_ids).countable)
    wanted = reference(model, input_ids, selection, gradient=gradient, **inputs)
    for engine in ENGINES:
        assert_equal(routed(model, input_ids, selection, gradient=gradient, engine=engine, **inputs), wanted)


def ordinary(model, input_ids, labels):
    loss = model(input_ids=input_ids, labels=labels).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("name", ROUTABLE)
def test_everything_kept_is_ordinary_training(name):
    """Both engines, with every token in the gradient pass, including those without a label."""
    model, (input_ids, labels) = ROUTABLE[name](), partly_labelled()
    countable = aligned(model, labels).countable
    everything = Selection.from_mask(
        torch.ones_like(countable), weight=countable.float(), countable=countable, capacity=LENGTH
    )
    wanted = ordinary(model, input_ids, labels)
    for gradient in ("kv", "detached"):
        for engine in ENGINES:
            found = routed(model, labels, everything, gradient=gradient, engine=engine, input_ids=input_ids)
            assert_equal(found, wanted)


@pytest.mark.parametrize("name", ROUTABLE)
def test_a_ratio_of_one_is_ordinary_training(name):
    model, (input_ids, labels) = ROUTABLE[name](), partly_labelled()
    wanted = ordinary(model, input_ids, labels)
    for gradient in ("exact", "kv", "detached", "sequence") if name in A_FEW else ("kv",):
        wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0)
        loss = wrapped(input_ids, labels=labels)
        loss.backward()
        assert_equal((loss.detach(), gradients(model)), wanted)


@pytest.mark.parametrize(
    ("name", "gradient"), [*((name, "kv") for name in ROUTABLE), *((name, "detached") for name in A_FEW)]
)
def test_going_on_from_a_truncated_router(name, gradient):
    """Scores come from the first layers, whose keys, values and hidden states the gradient pass takes over."""
    model, input_ids = ROUTABLE[name](), batch()
    settings = {"gradient": gradient, "min_tokens_ratio": 0.4, "selection": "sampled", "seed": 3}
    router = create_truncated_router(model, 1)
    wrapped = CGGRModel(model, router, **settings)
    loss = wrapped(input_ids, labels=input_ids)
    loss.backward()
    found = loss.detach(), gradients(model)
    assert wrapped.metrics["engine"] == "interleaved"

    # The same scores from the router as a model of its own, and the same selection passed in.
    apart = CGGRModel(model, router, engine="two_pass", **settings)
    loss = apart(input_ids, labels=input_ids)
    loss.backward()
    assert apart.metrics["engine"] == "two_pass"
    torch.testing.assert_close(apart.metrics["score_kept"], wrapped.metrics["score_kept"])
    assert_equal(found, (loss.detach(), gradients(model)))


@pytest.mark.parametrize("gradient", ["kv", "detached"])
@pytest.mark.parametrize("name", UNROUTABLE)
def test_architectures_without_keys_and_values_name_what_works(name, gradient):
    model = UNROUTABLE[name]()
    with pytest.raises(ValueError, match="use gradient='exact' or gradient='sequence'"):
        CGGRModel(model, gradient=gradient)(batch(), labels=batch()).backward()


@pytest.mark.parametrize("gradient", ["exact", "sequence"])
@pytest.mark.parametrize("name", UNROUTABLE)
def test_exact_and_sequence_work_without_keys_and_values(name, gradient):
    model, input_ids = UNROUTABLE[name](), batch()
    plain = model(input_ids=input_ids, labels=input_ids).loss
    plain.backward()
    wanted = plain.detach(), gradients(model)
    loss = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0)(input_ids, labels=input_ids)
    loss.backward()
    assert_equal((loss.detach(), gradients(model)), wanted)


@pytest.mark.parametrize("name", ["llama", "mistral-sliding", "gemma3"])
@pytest.mark.parametrize("form", ["whole", "padded", "packed"])
def test_attention_in_stretches_of_queries(name, form, monkeypatch):
    """As on long rows, where each stretch of queries gets only the keys that it sees."""
    monkeypatch.setattr(masks, "STRETCH", 2)
    model, input_ids = ROUTABLE[name](), batch()
    labels, inputs = input_ids.clone(), {}
    if form == "padded":
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, -4:] = attention_mask[1, :3] = 0
        labels, inputs = labels.masked_fill(attention_mask == 0, -100), {"attention_mask": attention_mask}
    elif form == "packed":
        labels, inputs = labels.masked_fill(PACKED == 0, -100), {"position_ids": PACKED}
    selection = random_selection(aligned(model, labels).countable)
    wanted = reference(model, labels, selection, gradient="kv", input_ids=input_ids, **inputs)
    for engine in ENGINES:
        settings = {"gradient": "kv", "engine": engine, "input_ids": input_ids}
        assert_equal(routed(model, labels, selection, **settings, **inputs), wanted)
