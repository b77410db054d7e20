"""The op ``routed_attention`` in place of SDPA with a mask: the same gradients for every mask that the op supports."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from cggr_core import CGGRModel
from cggr_core.backends import _registry
from cggr_core.routed_attention import routed_attention_reference
from cggr_core.routing.attention import implementation
from cggr_core.routing.masks import RoutedMask, Visibility, causal_window
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB

POSITIONS = torch.tensor([[*range(5), *range(8)], [*range(9), *range(4)]])


@pytest.fixture
def kernel(monkeypatch):
    """The reference, registered as a CPU kernel that returns only the requested gradients; counts its calls."""
    calls = []

    def routed_attention(q, k, v, q_position, *args):
        calls.append((q, k, v, q_position, *args))
        if args[-1] == "kept":
            kept = torch.zeros(k.shape[:2], dtype=torch.bool).scatter_(1, q_position, True)[:, :, None, None]
            k, v = (torch.where(kept, part, part.detach()) for part in (k, v))
        return routed_attention_reference(q, k, v, q_position, *args)

    monkeypatch.setitem(_registry.kernels, ("routed_attention", "cpu"), ("test", routed_attention))
    return calls


def inputs(case: str):
    input_ids = torch.randint(3, VOCAB, (2, 13), generator=torch.Generator().manual_seed(0))
    if case == "packed":
        return {"input_ids": input_ids, "position_ids": POSITIONS}
    if case == "padded":
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, :3] = 0
        attention_mask[1, 9:] = 0
        return {"input_ids": input_ids, "attention_mask": attention_mask}
    return {"input_ids": input_ids}


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
@pytest.mark.parametrize("case", ["plain", "packed", "padded"])
@pytest.mark.parametrize(
    ("name", "gradient"),
    [
        *((name, "kv") for name in ("llama", "mistral-sliding", "qwen3-sliding", "gemma3", "gpt2", "phi3")),
        *((name, "detached") for name in ("llama", "gemma3")),
    ],
)
def test_equals_attention_with_a_mask(name, case, gradient, engine, kernel, monkeypatch):
    model, given = ROUTABLE[name](), inputs(case)
    labels = given["input_ids"].masked_fill(given.get("attention_mask", torch.ones(2, 13)) == 0, -100)
    settings = {"gradient": gradient, "engine": engine, "selection": "random", "min_tokens_ratio": 0.4}
    CGGRModel(model, **settings)(labels=labels, **given).backward()
    found = gradients(model)
    assert len(kernel) > 0
    # In the gradient pass, whose queries are fewer than the keys, what the other tokens' keys learn from is the mode.
    asked = {args[-1] for args in kernel if args[0].requires_grad}
    assert asked == {"all" if gradient == "kv" else "kept"}
    monkeypatch.undo()
    CGGRModel(model, **settings)(labels=labels, **given).backward()
    assert relative_error(found, gradients(model)) <= 1e-5


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
def test_under_autocast_everything_has_its_dtype(engine, kernel):
    """Rotations leave queries and keys in float32, which SDPA casts and a kernel does not."""
    given = inputs("plain")
    wrapped = CGGRModel(ROUTABLE["llama"](), engine=engine, selection="random")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wrapped(labels=given["input_ids"], **given).backward()
    assert kernel and {part.dtype for args in kernel for part in args[:3]} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["gemma2", "gptj", "bloom", "gpt-oss"])
def test_eager_attention_is_left_as_it_was_asked_for(name, kernel):
    model = ROUTABLE[name]()
    model.set_attn_implementation("eager")
    CGGRModel(model, selection="random")(labels=inputs("plain")["input_ids"], **inputs("plain")).backward()
    assert not kernel


@pytest.mark.parametrize(("replaced", "softcap"), [("sdpa", None), ("flash_attention_2", 50.0)])
def test_caps_scores_where_the_attention_it_replaces_does(replaced, softcap, kernel):
    """SDPA has no softcap, and transformers calls it without; flash attention applies it."""
    model = ROUTABLE["gemma2"](attn_logit_softcapping=50.0)
    name = implementation(model, "cpu")(replaced)
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8)
    visibility = Visibility(torch.tensor([[0, 2, 4]]), 5, None, None, torch.arange(5)[None])
    mask = RoutedMask(visibility, causal_mask_function, {})
    layer = model.model.layers[0].self_attn
    AttentionInterface()[name](layer, query, key, key, mask, scaling=0.3, softcap=50.0)
    assert kernel[-1][6] == softcap


@pytest.mark.parametrize("name", ["bert-masked", "falcon-alibi"])
def test_patterns_that_are_not_in_numbers_go_to_sdpa(name, kernel):
    model, given = ROUTABLE[name](), inputs("plain")
    CGGRModel(model, selection="random")(labels=given["input_ids"], **given).backward()
    assert not kernel


def test_dropout_goes_to_sdpa(kernel):
    model, given = ROUTABLE["llama"](attention_dropout=0.5), inputs("plain")
    wrapped = CGGRModel(model, selection="random")
    wrapped(labels=given["input_ids"], **given)
    kernel.clear()
    wrapped(labels=given["input_ids"], **given).backward()
    assert not kernel


@pytest.mark.parametrize(
    ("mask_function", "expected"),
    [
        (causal_mask_function, (True, None)),
        (sliding_window_causal_mask_function(7), (True, 7)),
        (chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)), (False, None)),
        (bidirectional_mask_function, (False, None)),
        (lambda batch, head, query, key: key <= query, (False, None)),
    ],
)
def test_recognises_the_patterns_that_numbers_can_say(mask_function, expected):
    assert causal_window(mask_function) == expected


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("segmented", [False, True])
def test_the_reference_is_attention_with_the_mask_it_describes(window, segmented):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)
    position = torch.tensor([[0, 2, 5, 8], [1, 3, 4, 7]])
    segment = torch.tensor([[0] * 4 + [1] * 5, [-1] * 2 + [0] * 7]) if segmented else None
    distance = position[:, :, None] - torch.arange(9)
    mask = (distance >= 0) & (distance < (window or 99))
    if segmented:
        own = segment.gather(1, position)[:, :, None]
        mask &= (own == segment[:, None]) & (own >= 0)
    expected = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask[:, None], enable_gqa=True
    ).transpose(1, 2)
    seen = mask.any(2)[:, :, None, None]
    found = routed_attention_reference(q, k, v, position, segment, window)
    torch.testing.assert_close(found, expected.masked_fill(~seen, 0.0))
