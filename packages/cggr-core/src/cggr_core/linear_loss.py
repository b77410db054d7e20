"""Cross-entropy of a head on chosen rows, without a tensor of all their logits.

The reference of the op ``linear_cross_entropy`` is :func:`chunked_linear_cross_entropy`. With ``reduction="sum"`` the
gradients are computed in the forward pass while a chunk's logits are available: three matrix products per row instead
of four, and only the gradients are kept for the backward pass. :func:`linear_cross_entropy_by_autograd` is the plain
form that the tests compare with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_core.backends import register_reference, resolve
from cggr_core.checks import (
    check_choice,
    check_float,
    check_same_device,
    check_shape,
    check_targets,
    first_derivatives_only,
    values_are_free,
)
from cggr_core.head import accumulation_dtype, check_head, head_operands, product_dtype
from cggr_core.head_chunks import HeadChunks, HeadGradients, row_chunks, scatter_rows, without_autocast

__all__ = ["chunked_linear_cross_entropy", "linear_cross_entropy", "linear_cross_entropy_by_autograd"]

REDUCTIONS = ("sum", "none")


def _row_terms(
    targets: Tensor, row_index: Tensor | None, row_weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Target of each row, and its weight: 0 where the target is ignored."""
    N = targets.shape[0]
    if row_index is not None:
        targets = targets[row_index]
        if row_weight is not None and row_weight.shape[0] == N and row_index.shape[0] != N:
            row_weight = row_weight[row_index]
    live = targets != ignore_index
    weight = live.to(dtype) if row_weight is None else row_weight.detach().to(dtype).masked_fill(~live, 0.0)
    return targets, weight


def linear_cross_entropy_by_autograd(
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
) -> Tensor:
    """The op ``linear_cross_entropy`` in five lines of autograd, all logits at once."""
    hidden, weight, bias = head_operands(hidden, weight, bias)
    targets, coefficient = _row_terms(targets, row_index, row_weight, ignore_index, accumulation_dtype(hidden.dtype))
    rows = hidden if row_index is None else hidden[row_index]
    logits = torch.nn.functional.linear(rows, weight, bias).to(coefficient.dtype)
    logits = logits if scale is None else logits * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    # Rows with weight 0 are ignored, not multiplied by 0: their loss may be infinite.
    targets = targets.masked_fill(coefficient == 0.0, -1)
    loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="none") * coefficient
    return loss.sum() if reduction == "sum" else loss


class _SumLoss(torch.autograd.Function):
    """Weighted sum of the losses; its gradients are computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        coefficient: Tensor,
        row_index: Tensor | None,
        softcap: float | None,
        scale: float | None,
        product_dtype: torch.dtype,
    ) -> Tensor:
        head = HeadChunks(hidden, weight, bias, targets, row_index, softcap, scale, product_dtype)
        needs = ctx.needs_input_grad[:3]
        M = targets.shape[0]
        total = coefficient.new_zeros(())
        gradients = HeadGradients(head, M, needs)
        dead = coefficient == 0.0
        for chunk in row_chunks(M, hidden, weight.shape[0]):
            rows = head.rows(chunk, dead[chunk])
            loss, e, sums, slope = head.losses(rows, chunk)
            # Not in place: torch 2.11 compiles a result that was changed in place as one without a gradient.
            total = total + (loss * coefficient[chunk]).masked_fill_(dead[chunk], 0.0).sum()
            if any(needs):
                grad = head.logit_gradients(e, sums, slope, coefficient[chunk], chunk)
                gradients.add(grad, rows, head.weight, chunk)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias, row_index)
        ctx.rows, ctx.dtypes = hidden.shape[0], (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, row_index = ctx.saved_tensors
        if hidden is not None:
            hidden = scatter_rows((hidden * upstream).to(ctx.dtypes[0]), row_index, ctx.rows)
        # Not in place: the backward pass may run twice.
        weight = None if weight is None else (weight * upstream).to(ctx.dtypes[1])
        bias = None if bias is None else (bias * upstream).to(ctx.dtypes[2])
        return hidden, weight, bias, None, None, None, None, None, None


class _RowLoss(torch.autograd.Function):
    """Weighted loss of each row; the backward recomputes the logits chunk by chunk for any upstream gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        coefficient: Tensor,
        row_index: Tensor | None,
        softcap: float | None,
        scale: float | None,
        product_dtype: torch.dtype,
    ) -> Tensor:
        head = HeadChunks(hidden, weight, bias, targets, row_index, softcap, scale, product_dtype)
        M = targets.shape[0]
        dead = coefficient == 0.0
        out = torch.zeros_like(coefficient)
        for chunk in row_chunks(M, hidden, weight.shape[0]):
            loss = head.losses(head.rows(chunk, dead[chunk]), chunk)[0]
            out[chunk] = (loss * coefficient[chunk]).masked_fill_(dead[chunk], 0.0)
        ctx.save_for_backward(hidden, weight, bias, targets, coefficient, row_index)
        ctx.softcap, ctx.scale, ctx.product_dtype = softcap, scale, product_dtype
        return out

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, coefficient, row_index = ctx.saved_tensors
        head = HeadChunks(hidden, weight, bias, targets, row_index, ctx.softcap, ctx.scale, ctx.product_dtype)
        M = targets.shape[0]
        dead = coefficient == 0.0
        coefficient = (coefficient * upstream).masked_fill(dead, 0.0)
        gradients = HeadGradients(head, M, ctx.needs_input_grad[:3])
        for chunk in row_chunks(M, hidden, weight.shape[0]):
            rows = head.rows(chunk, dead[chunk])
            _, e, sums, slope = head.losses(rows, chunk)
            grad = head.logit_gradients(e, sums, slope, coefficient[chunk], chunk)
            gradients.add(grad, rows, head.weight, chunk)
        grad_hidden, grad_weight, grad_bias = gradients.hidden, gradients.weight, gradients.bias
        if grad_hidden is not None:
            grad_hidden = scatter_rows(grad_hidden.to(hidden.dtype), row_index, hidden.shape[0])
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        grad_bias = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


def chunked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_index: Tensor | None,
    row_weight: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
    ignore_index: int,
    reduction: str,
    max_logits: int | None = None,
) -> Tensor:
    """Plain-torch op ``linear_cross_entropy``, arguments as in :func:`linear_cross_entropy`, unchecked.

    It works in chunks of rows, so it computes no logits twice and gains nothing from holding more: ``max_logits`` is
    not used.
    """
    dtype = product_dtype(hidden, weight)
    if not torch.is_grad_enabled():
        # Otherwise the function would compute gradients that cannot be used.
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    targets, coefficient = _row_terms(targets, row_index, row_weight, ignore_index, accumulation_dtype(dtype))
    if reduction == "none":
        return without_autocast(_RowLoss, hidden, weight, bias, targets, coefficient, row_index, softcap, scale, dtype)
    if values_are_free(coefficient):
        # Counting is free here, so rows with weight 0 are dropped.
        live = coefficient.nonzero()[:, 0]
        if live.shape[0] < coefficient.shape[0]:
            row_index = live if row_index is None else row_index[live]
            targets, coefficient = targets[live], coefficient[live]
    return without_autocast(_SumLoss, hidden, weight, bias, targets, coefficient, row_index, softcap, scale, dtype)


register_reference("linear_cross_entropy", chunked_linear_cross_entropy)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    row_index: Tensor | None = None,
    row_weight: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
    max_logits: int | None = None,
) -> Tensor:
    """Weighted cross-entropy of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    The logits exist for a chunk of rows at a time. Gradients reach ``hidden``, ``weight`` and ``bias``, whichever
    require them. Under autocast the products run in its dtype; losses and the gradient of ``weight`` are accumulated
    in float32.

    Args:
        hidden: Final hidden states, shape [N, H].
        weight: The head's weight, shape [V, H].
        targets: Class indices, shape [N]; ``ignore_index`` for rows to leave out.
        row_index: Rows to use, shape [M] int64; None for all.
        row_weight: Constant factor on each row's loss, shape [M], or [N] (then indexed by ``row_index``). Rows of
            weight 0 give no loss and no gradient, whatever they contain.
        bias: The head's bias, shape [V].
        softcap: Bound on the logits; None for none.
        scale: Factor on the logits before the softcap; None for 1.
        ignore_index: Target value of rows to leave out.
        reduction: "sum" for a scalar, "none" for the weighted loss of each row. "none" computes the logits again in the
            backward pass; "sum" does not.
        max_logits: Number of logits that may be held at once if that is faster; None always works in chunks.

    Returns:
        A float32 tensor (float64 for float64 operands), 0-dim or [M].

    Raises:
        TypeError: If a dtype is wrong, or those of ``hidden`` and ``weight`` differ outside of autocast.
        ValueError: If shapes or devices disagree, ``row_weight`` requires a gradient, or (on CPU) a target is outside
            the vocabulary or a row index outside ``hidden``. On other devices targets are clamped.

    Example:
        >>> hidden = torch.zeros(3, 8, requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, torch.zeros(4, 8), torch.tensor([1, -100, 2]))
        >>> round(loss.item(), 4)
        2.7726
    """
    check_head(hidden, weight, bias, softcap, scale)
    check_choice("reduction", reduction, REDUCTIONS)
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden must be [N, H], got shape {tuple(hidden.shape)}; flatten it with hidden.flatten(0, -2)"
        )
    N = hidden.shape[0]
    targets = check_targets("targets", targets, (N,), weight.shape[0], ignore_index, hidden, "hidden")
    M = N
    if row_index is not None:
        if row_index.dtype != torch.int64 or row_index.dim() != 1:
            raise TypeError(
                f"row_index must be int64 of shape [M], got {row_index.dtype} of shape {tuple(row_index.shape)}"
            )
        check_same_device("row_index", row_index, "hidden", hidden)
        M = row_index.shape[0]
        if M and values_are_free(row_index):
            lowest, highest = int(row_index.min()), int(row_index.max())
            if lowest < 0 or highest >= N:
                raise ValueError(f"row_index must be in [0, {N}), got values from {lowest} to {highest}")
    if row_weight is not None:
        check_float("row_weight", row_weight)
        if row_weight.dim() != 1 or row_weight.shape[0] not in (M, N):
            check_shape("row_weight", row_weight, (M,), "one per used row")
        check_same_device("row_weight", row_weight, "hidden", hidden)
        if row_weight.requires_grad:
            raise ValueError("row_weight requires a gradient, but it is used as a constant; pass row_weight.detach()")
    op = resolve("linear_cross_entropy", hidden.device.type, hidden.dtype)
    return op(hidden, weight, targets, row_index, row_weight, bias, softcap, scale, ignore_index, reduction, max_logits)
