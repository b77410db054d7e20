"""Runs the experts of Hugging Face models in the op ``moe_experts``, through transformers' own setting for it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.backends import resolve

__all__ = ["EXPERTS_IMPLEMENTATION", "register_experts"]

EXPERTS_IMPLEMENTATION = "cggr"


def register_experts() -> str:
    """Let models of transformers run their experts in this package's op: persistent kernels on CUDA.

    The model keeps its router, parameters and auxiliary loss; only the computation of the chosen experts changes.
    Experts must be SwiGLU without biases, with the gate projection before the up projection, as in Mixtral, Qwen-MoE,
    OLMoE and DeepSeek; with other experts, the forward raises an error.

    Returns:
        ``"cggr"``, the name to pass as ``experts_implementation``.

    Raises:
        ImportError: If transformers is not installed.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> config = MixtralConfig(
        ...     vocab_size=32, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=2, num_local_experts=4,
        ... )
        >>> model = MixtralForCausalLM(config)
        >>> model.set_experts_implementation(register_experts())
        >>> model(torch.zeros(1, 4, dtype=torch.long)).logits.shape
        torch.Size([1, 4, 32])
    """
    try:
        moe: Any = import_module("transformers.integrations.moe")
    except ModuleNotFoundError as error:
        raise ImportError(
            "experts of Hugging Face models need transformers >= 5.17: python -m pip install 'transformers>=5.17'"
        ) from error
    moe.ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _run_experts)
    return EXPERTS_IMPLEMENTATION


def _run_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of an experts module of transformers, with the signature that transformers expects."""
    experts: Any = module
    _check_kind(experts)
    gate_up, down = experts.gate_up_proj, experts.down_proj
    # An index beyond the last expert means an expert on another rank.
    index = top_k_index.masked_fill(top_k_index >= gate_up.shape[0], -1).long()
    run = resolve("moe_experts", hidden_states.device.type, hidden_states.dtype)
    weight = top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32))
    return run(hidden_states, gate_up, down, index, weight)


def _check_kind(experts: Any) -> None:
    wants = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    other = [f"{name}={not value}" for name, value in wants.items() if getattr(experts, name, value) is not value]
    if getattr(experts, "has_post_expert_norm", False):
        other.append("has_post_expert_norm=True")
    if getattr(type(experts)._apply_gate, "__name__", "") != "_default_apply_gate":
        other.append("a gate of its own")
    elif type(getattr(experts, "act_fn", None)).__name__ not in ("SiLU", "SiLUActivation"):
        other.append(f"the activation {type(experts.act_fn).__name__}")
    if other:
        raise ValueError(
            f"experts_implementation={EXPERTS_IMPLEMENTATION!r} runs SwiGLU experts without biases, but "
            f"{type(experts).__name__} has {', '.join(other)}; use experts_implementation='grouped_mm'"
        )
