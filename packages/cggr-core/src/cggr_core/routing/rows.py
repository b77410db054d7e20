"""Rows of keys, values and hidden states put together and told apart, with just the gradients that a mode lets through.

Written as autograd functions because their backward passes are single gathers: autograd's own, for the same scatters,
copies the full-length gradient several times.
"""

from typing import Any

import torch
from torch import Tensor


class _MergeRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        other: Tensor,
        kept: Tensor,
        other_index: Tensor,
        kept_index: Tensor,
        passes: Tensor | None,
        merged: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(other_index, kept_index, passes)
        if merged is not None:
            return merged.view_as(merged)
        length = other.shape[2] + kept.shape[2]
        merged = kept.new_empty(*kept.shape[:2], length, kept.shape[3])
        merged.scatter_(2, _rows(other_index, other), other)
        return merged.scatter_(2, _rows(kept_index, kept), kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        other_index, kept_index, passes = ctx.saved_tensors
        other_grad = kept_grad = None
        if ctx.needs_input_grad[0]:
            other_grad = grad.gather(2, _rows(other_index, grad))
        if ctx.needs_input_grad[1]:
            kept_grad = grad.gather(2, _rows(kept_index, grad))
            kept_grad = kept_grad if passes is None else kept_grad.masked_fill(~passes[:, None, :, None], 0)
        return other_grad, kept_grad, None, None, None, None


class _ReplaceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, kept: Tensor, index: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(index, valid)
        return full.scatter(2, _rows(index, kept), kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, valid = ctx.saved_tensors
        rows, valid = _rows(index, grad), valid[:, None, :, None]
        kept = grad.gather(2, rows)
        full_grad = grad.scatter(2, rows, kept.masked_fill(valid, 0)) if ctx.needs_input_grad[0] else None
        return full_grad, kept.masked_fill(~valid, 0) if ctx.needs_input_grad[1] else None, None, None


class _StopGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, passes: Tensor) -> Tensor:
        ctx.save_for_backward(passes)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (passes,) = ctx.saved_tensors
        return grad.masked_fill(~passes[:, :, None], 0), None


def merge_rows(
    other: Tensor,
    kept: Tensor,
    *,
    other_index: Tensor,
    kept_index: Tensor,
    passes: Tensor | None = None,
    merged: Tensor | None = None,
) -> Tensor:
    """Put two disjoint sets of rows that cover all positions in order.

    Args:
        other: ``[B, H, M, D]``.
        kept: ``[B, H, K, D]``.
        other_index: Positions of ``other``, ``[B, M]``.
        kept_index: Positions of ``kept``, ``[B, K]``.
        passes: bool ``[B, K]``, the rows of ``kept`` that take a gradient; ``None`` for all.
        merged: The result, where it is at hand; it then only gets its gradients.

    Returns:
        ``[B, H, M + K, D]``, differentiable in ``other`` and ``kept``.
    """
    return _MergeRows.apply(other, kept, other_index, kept_index, passes, merged)


def replace_rows(full: Tensor, kept: Tensor, *, index: Tensor, valid: Tensor) -> Tensor:
    """Full-length rows with the kept ones fresh.

    Args:
        full: ``[B, H, S, D]``.
        kept: ``[B, H, K, D]``; slots that are not valid hold what ``full`` holds.
        index: Positions of ``kept``, ``[B, K]``.
        valid: bool ``[B, K]``. Gradients of valid slots go to ``kept``, all others to ``full``.

    Returns:
        ``[B, H, S, D]``.
    """
    return _ReplaceRows.apply(full, kept, index, valid)


def stop_gradient(hidden: Tensor, *, passes: Tensor) -> Tensor:
    """``hidden`` ``[B, K, H]`` itself, with gradients only at ``passes`` ``[B, K]``."""
    return _StopGradient.apply(hidden, passes)


def _rows(index: Tensor, like: Tensor) -> Tensor:
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])
