"""Attention of one new token to a long cache that reads each key and value once for all heads that share it.

transformers repeats keys and values for every head if SDPA gets a mask, which takes most of the time of a decoded token
with long prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "one_token_grouped"
_PLAIN = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions"}


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """SDPA attention for transformers, except for a single query per row.

    Args:
        module: The attention layer.
        query: ``[B, H, Q, D]``.
        key: ``[B, G, S, D]``, of which ``H / G`` heads share one.
        value: As ``key``.
        attention_mask: bool ``[B, 1, Q, S]``, false for masked keys; None for no mask.
        **options: As passed by the layer.

    Returns:
        ``[B, Q, H, D]``, and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    told = {name for name, given in options.items() if given is not None} - _PLAIN
    if query.shape[2] > 1 or told or (attention_mask is not None and attention_mask.dtype != torch.bool):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows, heads, _, size = query.shape
    scale = options.get("scaling")
    scores = query.reshape(rows, key.shape[1], -1, size) @ key.transpose(2, 3)
    scores = scores.float() * (size**-0.5 if scale is None else scale)
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1).to(value.dtype) @ value).reshape(rows, 1, heads, -1), None


def use_grouped_attention(model: PreTrainedModel) -> bool:
    """Let a model that uses SDPA decode with :func:`attend`; other models are unchanged.

    Args:
        model: The model.

    Returns:
        Whether it does.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if own != "sdpa" or not getattr(model, "_supports_attention_backend", False):
        return False
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True


@contextmanager
def grouped_attention(model: PreTrainedModel) -> Iterator[None]:
    """:func:`use_grouped_attention` in the block."""
    used = use_grouped_attention(model)
    try:
        yield
    finally:
        if used:
            model.set_attn_implementation("sdpa")
