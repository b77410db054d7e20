"""A small model on the GPU, its batch, its gradients and their distance."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def model(dtype: torch.dtype = torch.float32, **settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    with torch.device("cuda"):
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **settings)).to(dtype).train()


def tokens() -> torch.Tensor:
    return torch.randint(0, 1000, (3, 257), generator=torch.Generator().manual_seed(0)).cuda()


def wide_model(dtype: torch.dtype, *, layers: int) -> LlamaForCausalLM:
    """A model whose sizes are multiples of 16, as FP8 products need."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": layers}
    with torch.device("cuda"):
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(dtype).train()


def wide_tokens() -> torch.Tensor:
    return torch.randint(0, 512, (4, 120), generator=torch.Generator().manual_seed(0)).cuda()


def varied(dtype: torch.dtype = torch.float32):
    """A model whose scores differ from token to token; those of fresh weights are all but the same."""
    base = model(dtype)
    with torch.no_grad():
        base.lm_head.weight.mul_(30)
    return base


def gradients(base) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in base.named_parameters()}
    base.zero_grad(set_to_none=True)
    return found


def relative_error(found, wanted) -> float:
    difference = sum((found[name] - wanted[name]).double().square().sum() for name in wanted)
    return float((difference / sum(value.double().square().sum() for value in wanted.values())).sqrt())
