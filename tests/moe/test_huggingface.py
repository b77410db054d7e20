"""Conversion to and from Hugging Face blocks: outputs and gradients of both, and errors."""

import sys

import pytest
import torch
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from cggr_moe import PersistentTRMLP, from_hf_block

COMMON = {"hidden_size": 16, "num_experts_per_tok": 2, "experts_implementation": "eager"}
BLOCKS = {
    "mixtral": (MixtralSparseMoeBlock, MixtralConfig(intermediate_size=24, num_local_experts=4, **COMMON)),
    "qwen3_moe": (
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig(moe_intermediate_size=24, num_experts=4, norm_topk_prob=True, **COMMON),
    ),
    "olmoe": (OlmoeSparseMoeBlock, OlmoeConfig(intermediate_size=24, num_experts=4, norm_topk_prob=False, **COMMON)),
}


def make_block(kind):
    block_type, config = BLOCKS[kind]
    torch.manual_seed(0)
    block = block_type(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def output_and_gradients(module, x):
    x = x.detach().requires_grad_()
    out = module(x)
    out = out[0] if isinstance(out, tuple) else out
    leaves = (x, module.gate.weight, *(getattr(module, "experts", module).parameters(recurse=False)))
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_there_and_back(kind):
    block = make_block(kind).eval()
    layer = PersistentTRMLP.from_hf(block)
    assert layer.gate_up_proj is block.experts.gate_up_proj
    assert not layer.training
    back = layer.to_hf(kind)
    assert type(back) is type(block)
    assert back.experts.down_proj is block.experts.down_proj
    assert back.state_dict().keys() == block.state_dict().keys()
    x = torch.randn(2, 7, 16)
    expected = output_and_gradients(block, x)
    for module in (layer, back):
        for value, truth in zip(output_and_gradients(module, x), expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)


def test_a_layer_of_ones_own_goes_to_every_kind():
    layer = PersistentTRMLP(16, 24, num_experts=4, top_k=2)
    x = torch.randn(1, 5, 16)
    for kind in BLOCKS:
        torch.testing.assert_close(layer.to_hf(kind)(x), layer(x)[0])


def test_refusals():
    with pytest.raises(ValueError, match=r"block must be one of MixtralSparseMoeBlock, .* got Linear"):
        from_hf_block(torch.nn.Linear(2, 2))
    block = make_block("mixtral")
    block.jitter_noise = 0.1
    with pytest.raises(ValueError, match=r"jitter_noise of block must be 0, got 0\.1"):
        from_hf_block(block)
    block = make_block("olmoe")
    block.experts.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="activation of block must be SiLU, got GELU"):
        from_hf_block(block)
    layer = PersistentTRMLP(16, 24, num_experts=4, top_k=2, norm_topk_prob=False)
    with pytest.raises(ValueError, match="kind='mixtral' always normalises"):
        layer.to_hf("mixtral")
    with pytest.raises(ValueError, match=r"kind must be one of .* did you mean 'olmoe'"):
        layer.to_hf("olmo")
    with pytest.raises(ValueError, match="router bias"):
        PersistentTRMLP(16, 24, num_experts=4, top_k=2, router_bias=True).to_hf()


def test_a_missing_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5\.17'"):
        PersistentTRMLP(16, 24, num_experts=4, top_k=2).to_hf()
