"""Cross-entropy of a head on chosen rows, without ever holding the logits of all classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_kernels._checks import check_device, check_first_derivatives, check_index
from cggr_kernels._head import check_head, in_product_dtype
from cggr_kernels._library import register
from cggr_kernels._linear_cross_entropy_chunks import (
    fake_forward,
    fake_gradient,
    fake_scale,
    launch_forward,
    launch_gradient,
    launch_scale,
)
from cggr_kernels._linear_cross_entropy_rows import kept_rows, used_rows
from cggr_kernels._linear_cross_entropy_sum import fake_sum, launch_sum

__all__ = ["REDUCTIONS", "linear_cross_entropy"]

REDUCTIONS = ("sum", "none")

_forward = register(
    "linear_cross_entropy(Tensor rows, Tensor weight, Tensor targets, Tensor? bias, float? softcap, float? scale)"
    " -> (Tensor, Tensor)",
    launch_forward,
    fake_forward,
)
_gradient = register(
    "linear_cross_entropy_gradient(Tensor rows, Tensor weight, Tensor targets, Tensor? bias, Tensor lse,"
    " Tensor upstream, float? softcap, float? scale, bool[] needs) -> (Tensor, Tensor, Tensor)",
    launch_gradient,
    fake_gradient,
)


_sum = register(
    "linear_cross_entropy_sum(Tensor hidden, Tensor weight, Tensor targets, Tensor? row_index, Tensor? bias,"
    " Tensor coefficient, float? softcap, float? scale, int max_logits, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    launch_sum,
    fake_sum,
)
_scale = register("linear_cross_entropy_scale_(Tensor(a!) x, Tensor factor) -> ()", launch_scale, fake_scale)


class _SumLoss(torch.autograd.Function):
    """Weighted sum of the rows' nll; the forward pass computes the gradients, the backward pass scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_index: Tensor | None,
        coefficient: Tensor,
        softcap: float | None,
        scale: float | None,
        max_logits: int,
    ) -> Tensor:
        needs = list(ctx.needs_input_grad[:3])
        nll, *grads = _sum(hidden, weight, targets, row_index, bias, coefficient, softcap, scale, max_logits, needs)
        ctx.save_for_backward(*(grad if need else None for grad, need in zip(grads, needs, strict=True)))
        return (torch.where(coefficient == 0, 0.0, nll) * coefficient).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivatives()
        # In place: a second gradient of the weight would double the memory. Autograd notices a second backward.
        grads = ctx.saved_tensors
        for grad in grads:
            if grad is not None:
                _scale(grad, upstream)
        return *grads, None, None, None, None, None, None


def _gradients_in_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, reduction: str) -> bool:
    """Whether the forward pass computes gradients: not in float16, where a loss scale would come too late."""
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    return reduction == "sum" and differentiable and hidden.dtype != torch.float16


class _RowLoss(torch.autograd.Function):
    """nll [M] of the rows; autograd handles the rest, so any upstream gradient is correct."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        scale: float | None,
    ) -> Tensor:
        nll, lse = _forward(rows, weight, targets, bias, softcap, scale)
        ctx.save_for_backward(rows, weight, targets, bias, lse)
        ctx.factors = (softcap, scale)
        return nll

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivatives()
        needs = list(ctx.needs_input_grad[:3])
        upstream = upstream.contiguous()
        grads = _gradient(*ctx.saved_tensors, upstream, *ctx.factors, needs)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


def _check_rows(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_index: Tensor | None,
    row_weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    N = hidden.shape[0]
    check_index("targets", targets, (N,))
    if row_index is not None:
        check_index("row_index", row_index, tuple(row_index.shape[:1]) or (0,))
    M = N if row_index is None else row_index.shape[0]
    if row_weight is not None and (row_weight.dim() != 1 or row_weight.shape[0] not in (M, N)):
        raise ValueError(f"row_weight must have shape ({M},) or ({N},), got {tuple(row_weight.shape)}")
    if row_weight is not None and row_weight.requires_grad:
        raise ValueError("row_weight requires a gradient, but it is treated as a constant; pass row_weight.detach()")
    check_device(hidden=hidden, weight=weight, targets=targets, row_index=row_index, row_weight=row_weight, bias=bias)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_index: Tensor | None = None,
    row_weight: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
    max_logits: int | None = None,
) -> Tensor:
    """Weighted cross-entropy of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`` on chosen rows.

    Exact: nothing is filtered or approximated. Memory beyond the gradients is a chunk of logits and three copies of the
    chosen rows; the gradient of ``weight`` is accumulated in float32 and rounded once. Except in float16, the gradients
    of a sum are computed in the forward pass, so its graph allows one backward pass, and the gradient buffers double as
    scratch space for those copies and that chunk: with up to a quarter of the rows chosen, no other memory is needed.

    Args:
        hidden: Final hidden states, shape ``[N, H]``, float32, float16 or bfloat16.
        weight: The head's weight, shape ``[V, H]``, same dtype as ``hidden`` unless autocast is on.
        targets: Class of each row, shape ``[N]``, int64. A class outside ``[0, V)`` makes the loss NaN.
        row_index: Rows to use, shape ``[M]``, int64; ``None`` for all. A row outside ``[0, N)`` makes the loss NaN.
        row_weight: Constant factor on the loss of each row, shape ``[M]`` or ``[N]``. Rows of weight 0 give no loss and
            no gradient, whatever they hold.
        bias: The head's bias, shape ``[V]``.
        softcap: Bound on the logits; ``None`` for none.
        scale: Factor on the logits before the softcap; ``None`` for 1.
        ignore_index: Target of rows to leave out.
        reduction: ``"sum"`` for a scalar, ``"none"`` for the weighted loss of each row.
        max_logits: For a sum, hold all logits at once if there are no more than this many, which saves a matrix
            product; ``None`` always works in chunks.

    Returns:
        float32, 0-dim or ``[M]``; differentiable with respect to ``hidden``, ``weight`` and ``bias``.

    Raises:
        TypeError: If a dtype is not accepted, or ``hidden`` and ``weight`` differ in dtype.
        ValueError: If shapes or devices do not match, or ``reduction`` is unknown.

    Example:
        >>> hidden = torch.zeros(3, 8, device="cuda")
        >>> linear_cross_entropy(hidden, torch.zeros(4, 8, device="cuda"), torch.tensor([1, -100, 2], device="cuda"))
        tensor(2.7726, device='cuda:0')
    """
    check_head(hidden, weight, bias, softcap=softcap, scale=scale)
    _check_rows(hidden, weight, targets, row_index, row_weight, bias)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    hidden, weight, bias = in_product_dtype(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        weight = weight.contiguous()
        M = targets.shape[0] if row_index is None else row_index.shape[0]
        if M and _gradients_in_forward(hidden, weight, bias, reduction):
            row_index, targets, coefficient = used_rows(hidden, targets, row_index, row_weight, ignore_index)
            rows = (targets.contiguous(), row_index, coefficient.contiguous())
            return _SumLoss.apply(hidden, weight, bias, *rows, softcap, scale, max_logits or 0)
        rows, targets, coefficient = kept_rows(hidden, targets, row_index, row_weight, ignore_index)
        nll = _RowLoss.apply(rows.contiguous(), weight, bias, targets.contiguous(), softcap, scale)
        loss = torch.where(coefficient == 0, 0.0, nll) * coefficient
    return loss.sum() if reduction == "sum" else loss
