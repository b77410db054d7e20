"""Attention of kept queries to full-length keys: the reference of the op ``routed_attention``."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_core.backends import register_reference
from cggr_core.head import accumulation_dtype

__all__ = ["routed_attention_reference"]


def routed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_position: Tensor,
    segment: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    key_gradient: str = "all",
) -> Tensor:
    """Plain-torch op ``routed_attention``: queries at t attend to keys ``s <= t`` in their window and segment.

    Args:
        q: ``[B, K, H, D]``.
        k: ``[B, S, Hkv, D]``, ``H`` a multiple of ``Hkv``.
        v: As ``k``.
        q_position: int64 ``[B, K]``.
        segment: int64 ``[B, S]``, negative for padding; ``None`` for one segment.
        window: Maximum number of keys per query, its own included.
        softcap: Scores become ``softcap * tanh(score / softcap)``.
        scale: Factor of the scores; ``D ** -0.5`` by default.
        key_gradient: ``"all"``, or ``"kept"`` if keys and values need gradients only at ``q_position`` (this reference
            computes them for all).

    Returns:
        ``[B, K, H, D]``; queries without a visible key give 0.
    """
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bkhd,bshd->bhks", q, keys) * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = q_position[:, :, None] - torch.arange(k.shape[1], device=q.device)
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    if segment is not None:
        own = segment.gather(1, q_position)[:, :, None]
        visible = visible & (own == segment[:, None, :]) & (own >= 0)
    hidden = ~visible[:, None]
    scores = scores.to(accumulation_dtype(scores.dtype))
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0).to(v.dtype)
    return torch.einsum("bhks,bshd->bkhd", probabilities, values)


register_reference("routed_attention", routed_attention_reference)
