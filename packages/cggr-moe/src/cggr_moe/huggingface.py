"""Mixture-of-experts blocks of Hugging Face Transformers 5, there and back; parameters are shared, not copied."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from cggr_core.checks import check_choice
from cggr_moe.layers import PersistentTRMLP

__all__ = ["from_hf_block", "to_hf_block"]

Layer = TypeVar("Layer", bound=PersistentTRMLP)


class _Kind(NamedTuple):
    """Where a block's class is, and what its configuration calls the sizes."""

    folder: str
    prefix: str
    experts: str
    intermediate: str
    always_normalised: bool = False


_KINDS = {
    "mixtral": _Kind("mixtral", "Mixtral", "num_local_experts", "intermediate_size", always_normalised=True),
    "qwen3_moe": _Kind("qwen3_moe", "Qwen3Moe", "num_experts", "moe_intermediate_size"),
    "olmoe": _Kind("olmoe", "Olmoe", "num_experts", "intermediate_size"),
}


def from_hf_block(block: nn.Module, layer_type: type[Layer] = PersistentTRMLP) -> Layer:
    """A layer that computes what ``block`` computes, with the same parameter tensors.

    Args:
        block: A ``MixtralSparseMoeBlock``, ``Qwen3MoeSparseMoeBlock`` or ``OlmoeSparseMoeBlock``.
        layer_type: Class of the layer.

    Returns:
        The layer, in the block's training mode. Its parameters are those of the block.

    Raises:
        ValueError: If the block is of another kind, has an activation other than SiLU, or adds jitter to its input.

    Example:
        >>> from transformers import OlmoeConfig
        >>> from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
        >>> config = OlmoeConfig(hidden_size=16, intermediate_size=8, num_experts=4, num_experts_per_tok=2)
        >>> from_hf_block(OlmoeSparseMoeBlock(config)).top_k
        2
    """
    blocks: Any = block
    kind = next((kind for kind in _KINDS.values() if type(block).__name__ == f"{kind.prefix}SparseMoeBlock"), None)
    if kind is None:
        names = ", ".join(f"{known.prefix}SparseMoeBlock" for known in _KINDS.values())
        raise ValueError(f"block must be one of {names}, got {type(block).__name__}")
    if not isinstance(blocks.experts.act_fn, nn.SiLU) and type(blocks.experts.act_fn).__name__ != "SiLUActivation":
        raise ValueError(f"block has the activation {type(blocks.experts.act_fn).__name__}; accepted is SiLU")
    if getattr(blocks, "jitter_noise", 0.0):
        raise ValueError(f"block has jitter_noise={blocks.jitter_noise}, which the layer does not have; set it to 0")
    experts, gate = blocks.experts, blocks.gate
    num_experts, double, hidden_dim = experts.gate_up_proj.shape
    with torch.device("meta"):
        layer = layer_type(
            hidden_dim,
            double // 2,
            num_experts,
            gate.top_k,
            norm_topk_prob=kind.always_normalised or gate.norm_topk_prob,
        )
    layer.gate.weight = gate.weight
    layer.gate_up_proj, layer.down_proj = experts.gate_up_proj, experts.down_proj
    layer._load = torch.zeros(num_experts, dtype=torch.int64, device=gate.weight.device)
    return layer.train(block.training)


def to_hf_block(layer: PersistentTRMLP, kind: str = "qwen3_moe") -> nn.Module:
    """A Hugging Face block that computes what ``layer`` computes, with the same parameter tensors.

    Needs transformers 5. The auxiliary loss stays behind: Hugging Face makes its own from the router's logits.

    Args:
        layer: The layer.
        kind: ``"mixtral"`` (whose weights are always normalised), ``"qwen3_moe"`` or ``"olmoe"``.

    Returns:
        The block, in the layer's training mode, computing with transformers' own code.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the kind is unknown or cannot say what the layer does: no router bias in any of them, no
            ``norm_topk_prob=False`` in Mixtral.

    Example:
        >>> to_hf_block(PersistentTRMLP(16, 32, num_experts=4, top_k=2), "mixtral").top_k
        2
    """
    chosen = _KINDS[check_choice("kind", kind, tuple(_KINDS))]
    if layer.router_bias is not None:
        raise ValueError("the layer has a router bias, which no Hugging Face block of these kinds has")
    if chosen.always_normalised and not layer.norm_topk_prob:
        raise ValueError("kind='mixtral' always normalises the weights, and the layer has norm_topk_prob=False")
    try:
        transformers = import_module("transformers")
    except ModuleNotFoundError as error:
        raise ImportError(
            "a Hugging Face block needs transformers >= 5.17: python -m pip install 'cggr-moe[transformers]'"
        ) from error
    module: Any = import_module(f"transformers.models.{chosen.folder}.modeling_{chosen.folder}")
    config = getattr(transformers, f"{chosen.prefix}Config")(
        hidden_size=layer.hidden_dim,
        num_experts_per_tok=layer.top_k,
        hidden_act="silu",
        experts_implementation="eager",
        **{chosen.experts: layer.num_experts, chosen.intermediate: layer.intermediate_dim},
        **({} if chosen.always_normalised else {"norm_topk_prob": layer.norm_topk_prob}),
    )
    with torch.device("meta"):
        block = getattr(module, f"{chosen.prefix}SparseMoeBlock")(config)
    block.gate.weight = layer.gate.weight
    block.experts.gate_up_proj, block.experts.down_proj = layer.gate_up_proj, layer.down_proj
    return block.train(layer.training)
