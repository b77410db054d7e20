"""Plain causal attention gets no mask, even while a CUDA graph is recorded and transformers cannot read positions."""

import pytest
import torch
import transformers.masking_utils
from transformers.integrations import sdpa_attention

from cggr_core import CGGRModel, create_truncated_router
from cggr_core.routing import whole_rows
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE

LENGTH = 12


@pytest.fixture
def masks(monkeypatch):
    """Of every call of SDPA: how many queries, and the mask. transformers takes itself to be recorded."""
    monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda *tensors: True)
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def noting(query, *arguments, attn_mask=None, **options):
        seen.append((query.shape[2], attn_mask))
        return attend(query, *arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(sdpa_attention.torch.nn.functional, "scaled_dot_product_attention", noting)
    return seen


def dense(masks) -> list[bool]:
    return [mask is not None for _, mask in masks]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "gpt2"])
def test_no_mask_is_made_and_the_numbers_are_the_same(name, masks):
    model, input_ids = ROUTABLE[name](), tokens(length=LENGTH)
    wanted = model(input_ids, use_cache=False).logits
    assert masks and all(dense(masks)), "else transformers has stopped making them, and the block is not needed"
    masks.clear()
    with whole_rows():
        found = model(input_ids, use_cache=False).logits
    assert masks and not any(dense(masks))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    masks.clear()
    model(input_ids, use_cache=False)
    assert all(dense(masks))


def test_masks_that_say_more_than_causal_are_made(masks):
    input_ids = tokens(length=LENGTH)
    padded = torch.ones_like(input_ids)
    padded[0, :4] = 0
    model = ROUTABLE["llama"]()
    wanted = model(input_ids, attention_mask=padded, use_cache=False).logits
    with whole_rows():
        found = model(input_ids, attention_mask=padded, use_cache=False).logits
    assert all(dense(masks))
    assert torch.equal(found, wanted)


def test_a_mask_that_a_model_adds_to_is_made(masks):
    """ALiBi, which Falcon puts into it."""
    model, input_ids = ROUTABLE["falcon-alibi"](), tokens(length=LENGTH)
    wanted = model(input_ids, use_cache=False).logits
    with whole_rows():
        found = model(input_ids, use_cache=False).logits
    assert masks and all(dense(masks))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("length", "needed"), [(8, False), (9, True)])
def test_a_window_needs_a_mask_where_rows_are_longer(length, needed, masks):
    model, input_ids = ROUTABLE["mistral-sliding"](sliding_window=8), tokens(length=length)
    wanted = model(input_ids, use_cache=False).logits
    masks.clear()
    with whole_rows():
        found = model(input_ids, use_cache=False).logits
    assert dense(masks) == [needed] * len(masks)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient": "kv"},
        {"gradient": "detached", "selection": "sampled"},
        {"gradient": "exact", "selection": "sampled"},
        {"gradient": "sequence", "min_tokens_ratio": 0.5},
    ],
    ids=lambda settings: settings["gradient"],
)
@pytest.mark.parametrize("truncated", [False, True])
def test_passes_over_all_tokens_need_none(settings, truncated, masks):
    model, input_ids = ROUTABLE["llama"](), tokens(length=LENGTH)
    router = create_truncated_router(model, num_layers=1) if truncated else None
    wrapped = CGGRModel(model, router=router, **settings)
    wrapped(input_ids, labels=input_ids)  # looks at the model once
    masks.clear()
    wrapped(input_ids, labels=input_ids).backward()
    of_all = [mask for queries, mask in masks if queries == LENGTH]
    assert of_all and all(mask is None for mask in of_all)
