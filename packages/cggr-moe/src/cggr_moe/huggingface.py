"""Mixture-of-experts blocks of Hugging Face Transformers 5, there and back; parameters are shared, not copied."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from cggr_moe.layers import PersistentTRMLP

__all__ = ["from_hf_block", "to_hf_block"]

Layer = TypeVar("Layer", bound=PersistentTRMLP)


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
    return layer_type.from_hf(block)


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
    return layer.to_hf(kind)
