"""CGGRModel around a loaded model: its backend in the context pass, routed attention in the gradient pass."""

import pytest
import torch

from cggr_core import CGGRModel
from cggr_flash import enable_flash_attention, load_model_with_flash_attention
from tests.support.attention_calls import attention_calls
from tests.support.families import FAMILIES

TOKENS = torch.randint(6, 97, (2, 24), generator=torch.Generator().manual_seed(0))


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
    with attention_calls() as calls:
        cggr(TOKENS, labels=TOKENS).backward()
    assert [call for call in calls if call[1] == 24] == [("sdpa", 24)] * 3
    assert [name for name, queries in calls if queries < 24] == ["cggr_routed_uncapped"] * 3
    assert model.config._attn_implementation == "sdpa"
