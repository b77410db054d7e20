"""Convert to and from mixture-of-experts blocks of Hugging Face Transformers 5; parameters are shared, not copied."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from cggr_moe.layers import PersistentTRMLP

__all__ = ["from_hf_block", "to_hf_block"]

Layer = TypeVar("Layer", bound=PersistentTRMLP)


def from_hf_block(block: nn.Module, layer_type: type[Layer] = PersistentTRMLP) -> Layer:
    """Convert a Hugging Face block to a layer that computes the same, sharing its parameters.

    Args:
        block: A ``MixtralSparseMoeBlock``, ``Qwen3MoeSparseMoeBlock`` or ``OlmoeSparseMoeBlock``.
        layer_type: Class of the layer.

    Returns:
        The layer, in the block's training mode.

    Raises:
        ValueError: If the block is of another class, its activation is not SiLU, or it adds jitter to its input.

    Example:
        >>> from transformers import OlmoeConfig
        >>> from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
        >>> config = OlmoeConfig(hidden_size=16, intermediate_size=8, num_experts=4, num_experts_per_tok=2)
        >>> from_hf_block(OlmoeSparseMoeBlock(config)).top_k
        2
    """
    return layer_type.from_hf(block)


def to_hf_block(layer: PersistentTRMLP, kind: str = "qwen3_moe") -> nn.Module:
    """Convert a layer to a Hugging Face block that computes the same, sharing its parameters.

    Requires transformers 5. The auxiliary loss is not carried over: Hugging Face computes its own from the router
    logits.

    Args:
        layer: The layer.
        kind: ``"mixtral"`` (whose weights are always normalised), ``"qwen3_moe"`` or ``"olmoe"``.

    Returns:
        The block, in the layer's training mode, running transformers' own code.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the kind is unknown, the layer has a router bias, or the layer has ``norm_topk_prob=False`` and
            the kind is Mixtral.

    Example:
        >>> to_hf_block(PersistentTRMLP(16, 32, num_experts=4, top_k=2), "mixtral").top_k
        2
    """
    return layer.to_hf(kind)
