"""CGGRModel around a loaded model: its backend in the context pass, routed attention in the gradient pass."""

from contextlib import contextmanager

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cggr_core import CGGRModel
from cggr_flash import enable_flash_attention, load_model_with_flash_attention
from tests.flash.families import FAMILIES

TOKENS = torch.randint(6, 97, (2, 24), generator=torch.Generator().manual_seed(0))


@contextmanager
def called():
    """The attention functions of transformers that are called in the block, each with its number of queries."""
    calls: list[tuple[str, int]] = []
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)

    def noting(name, function):
        def call(module, query, *args, **options):
            calls.append((name, query.shape[2]))
            return function(module, query, *args, **options)

        return call

    try:
        for name in ALL_ATTENTION_FUNCTIONS.valid_keys():
            ALL_ATTENTION_FUNCTIONS[name] = noting(name, ALL_ATTENTION_FUNCTIONS[name])
        yield calls
    finally:
        ALL_ATTENTION_FUNCTIONS._local_mapping.clear()
        ALL_ATTENTION_FUNCTIONS._local_mapping.update(before)


def gradients(model, gradient: str) -> dict[str, torch.Tensor]:
    cggr = CGGRModel(model, gradient=gradient, selection="topk", min_tokens_ratio=0.25).train()
    cggr(TOKENS, labels=TOKENS).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("gradient", ["kv", "detached"])
@pytest.mark.parametrize("family", ["llama", "mistral", "phi-2", "phi-3", "gpt2"])
def test_the_gradient_does_not_depend_on_the_backend(family, gradient):
    model = FAMILIES[family]()
    expected = gradients(enable_flash_attention(model, "eager"), gradient)
    found = gradients(enable_flash_attention(model, "sdpa"), gradient)
    assert found.keys() == expected.keys()
    largest = max(value.norm() for value in expected.values())
    for name in expected:
        assert (found[name] - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6 * largest, name
    assert model.config._attn_implementation == "sdpa"


def test_a_loaded_model_keeps_its_backend_for_the_context_pass(tmp_path):
    FAMILIES["llama"]().save_pretrained(tmp_path)
    model = load_model_with_flash_attention(tmp_path)
    cggr = CGGRModel(model, min_tokens_ratio=0.25).train()
    cggr(TOKENS, labels=TOKENS).backward()  # looks at the model on a few tokens first
    with called() as calls:
        cggr(TOKENS, labels=TOKENS).backward()
    assert [call for call in calls if call[1] == 24] == [("sdpa", 24)] * 3
    assert [name for name, queries in calls if queries < 24] == ["cggr_routed_uncapped"] * 3
    assert model.config._attn_implementation == "sdpa"
