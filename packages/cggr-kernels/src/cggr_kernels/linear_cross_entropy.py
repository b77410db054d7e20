"""Cross-entropy of a head on chosen rows, without the logits of all classes at any time.

The logits are made for a chunk of the classes at a time, by the vendor's matrix product, into one small buffer that two
kernels read while it is in the cache. Chunks of classes, not of rows, because the gradient of the head's weight is then
complete chunk by chunk: it is accumulated in float32 inside one product and written once, and no float32 copy of the
weight exists. The price is that the backward pass makes the logits again.

Where the logits of the rows fit a gibibyte and the loss is their sum, they are made once and whole, and turned into
gradients in place: one matrix product of four less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_kernels._checks import check_device, check_float, check_index, check_vocabulary
from cggr_kernels._library import register
from cggr_kernels.linear_cross_entropy_details._chunk import LOWEST, chunk_gradient_kernel, chunk_lse_kernel

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
REDUCTIONS = ("sum", "none")
# Logits held at once: 2**24 of two bytes stay in the 50 MB cache of an H100 or H200. Not fewer columns than keep the
# products efficient, however many rows there are.
CHUNK_ELEMENTS = 2**24
MIN_COLUMNS = 4096
# Logits that may be held whole for a sum: 1 GiB of bfloat16.
WHOLE_ELEMENTS = 2**29
_BLOCK = 4096


def linear_cross_entropy_reference(
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
    """Plain-torch twin of :func:`linear_cross_entropy`; the truth its tests compare with.

    Args:
        hidden: Shape ``[N, H]``.
        weight: Shape ``[V, H]``.
        targets: Shape ``[N]``, int64.
        row_index: Shape ``[M]``, int64, or ``None``.
        row_weight: Shape ``[M]`` or ``[N]``, or ``None``.
        bias: Shape ``[V]``, or ``None``.
        softcap: Bound of the logits, or ``None``.
        scale: Factor on the logits, or ``None``.
        ignore_index: Target of rows that count for nothing.
        reduction: ``"sum"`` or ``"none"``.

    Returns:
        The weighted losses ``[M]``, or their sum.
    """
    rows, targets, coefficient = _kept_rows(hidden, targets, row_index, row_weight, ignore_index)
    logits_MV = torch.nn.functional.linear(rows, weight, bias).to(coefficient.dtype)
    logits_MV = logits_MV if scale is None else logits_MV * scale
    logits_MV = logits_MV if softcap is None else softcap * torch.tanh(logits_MV / softcap)
    safe_M = targets.masked_fill(coefficient == 0, -1)
    nll_M = torch.nn.functional.cross_entropy(logits_MV, safe_M, ignore_index=-1, reduction="none")
    return (nll_M * coefficient).sum() if reduction == "sum" else nll_M * coefficient


def _kept_rows(
    hidden: Tensor, targets: Tensor, row_index: Tensor | None, row_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [M, H], targets [M] and coefficients [M] of the loss; 0 and zeros in rows that count for nothing."""
    N = hidden.shape[0]
    kind = torch.promote_types(hidden.dtype, torch.float32)
    if row_weight is not None:
        row_weight = row_weight.detach().to(kind)
    if row_index is not None:
        inside = (row_index >= 0) & (row_index < N)
        # No index may reach the device unclamped; one from outside makes the loss NaN.
        row_index = row_index.clamp(0, max(N - 1, 0))
        if row_weight is None:
            row_weight = torch.ones(row_index.shape, dtype=kind, device=hidden.device)
        elif row_weight.shape[0] == N and row_index.shape[0] != N:
            row_weight = row_weight.index_select(0, row_index)
        row_weight = row_weight.masked_fill(~inside, torch.nan)
        hidden = hidden.index_select(0, row_index)
        targets = targets.index_select(0, row_index)
    ignored = targets == ignore_index
    coefficient = (~ignored).to(kind) if row_weight is None else row_weight.masked_fill(ignored, 0)
    # Whatever a row of no weight holds must not reach the weight's gradient.
    return hidden.masked_fill((coefficient == 0)[:, None], 0), targets, coefficient


def _factors(softcap: float | None, scale: float | None) -> dict[str, Any]:
    scale = 1.0 if scale is None else scale
    return {
        "unit": (scale if softcap is None else softcap) * LOG2E,
        "inner": 1.0 if softcap is None else scale / softcap,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK": _BLOCK,
        "num_warps": 8,
    }


def _chunks(M: int, V: int) -> list[tuple[int, int]]:
    columns = min(V, max(MIN_COLUMNS, CHUNK_ELEMENTS // max(M, 1) // 256 * 256))
    return [(start, min(start + columns, V)) for start in range(0, V, columns)]


def _raw(buffer: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, start: int, end: int) -> Tensor:
    """Columns [start, end) of the head's output, contiguous, in the buffer."""
    M = rows.shape[0]
    out = buffer[: M * (end - start)].view(M, end - start)
    if bias is None:
        return torch.mm(rows, weight[start:end].t(), out=out)
    return torch.addmm(bias[start:end], rows, weight[start:end].t(), out=out)


def _launch(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    M, V = rows.shape[0], weight.shape[0]
    state_3M = torch.empty(3, M, dtype=torch.float32, device=rows.device)
    # The loss of a target that no chunk has is NaN.
    state_3M[0], state_3M[1], state_3M[2] = LOWEST.value, 0.0, torch.nan
    if M:
        chunks = _chunks(M, V)
        buffer = torch.empty(M * chunks[0][1], dtype=rows.dtype, device=rows.device)
        for start, end in chunks:
            raw = _raw(buffer, rows, weight, bias, start, end)
            chunk_lse_kernel[(M,)](raw, targets, state_3M, M, end - start, start, **_factors(softcap, scale))
    lse_M = state_3M[0] + state_3M[1].log2()
    return (lse_M - state_3M[2]) * LN2, lse_M


def _fake(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    M = rows.shape[0]
    return rows.new_empty(M, dtype=torch.float32), rows.new_empty(M, dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` in float32."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.add_(torch.mm(a, b))


def _launch_gradient(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    upstream: Tensor,
    softcap: float | None,
    scale: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    M, V = rows.shape[0], weight.shape[0]
    d_rows = torch.zeros(rows.shape if needs[0] else 0, dtype=torch.float32, device=rows.device)
    create = torch.empty if M else torch.zeros
    d_weight = create(weight.shape if needs[1] else 0, dtype=weight.dtype, device=rows.device)
    d_bias = create(V if needs[2] else 0, dtype=torch.float32, device=rows.device)
    if M:
        chunks = _chunks(M, V)
        buffer = torch.empty(M * chunks[0][1], dtype=rows.dtype, device=rows.device)
        for start, end in chunks:
            raw = _raw(buffer, rows, weight, bias, start, end)
            chunk_gradient_kernel[(M,)](
                raw,
                targets,
                lse,
                upstream,
                end - start,
                start,
                scale=1.0 if scale is None else scale,
                **_factors(softcap, scale),
            )
            if needs[0]:
                _add_product(d_rows, raw, weight[start:end])
            if needs[1]:
                torch.mm(raw.t(), rows, out=d_weight[start:end])
            if needs[2]:
                torch.sum(raw, 0, dtype=torch.float32, out=d_bias[start:end])
        del buffer
    return d_rows.to(rows.dtype), d_weight, d_bias.to(rows.dtype)


def _fake_gradient(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    upstream: Tensor,
    softcap: float | None,
    scale: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (rows.shape, weight.shape, weight.shape[:1])
    d_rows, d_weight, d_bias = (rows.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))
    return d_rows, d_weight, d_bias


def _launch_whole(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    coefficient: Tensor,
    softcap: float | None,
    scale: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, V = rows.shape[0], weight.shape[0]
    state_3M = torch.empty(3, M, dtype=torch.float32, device=rows.device)
    state_3M[0], state_3M[1], state_3M[2] = LOWEST.value, 0.0, torch.nan
    raw = _raw(torch.empty(M * V, dtype=rows.dtype, device=rows.device), rows, weight, bias, 0, V)
    factors = _factors(softcap, scale)
    chunk_lse_kernel[(M,)](raw, targets, state_3M, M, V, 0, **factors)
    lse_M = state_3M[0] + state_3M[1].log2()
    nll_M = (lse_M - state_3M[2]) * LN2
    scale = 1.0 if scale is None else scale
    chunk_gradient_kernel[(M,)](raw, targets, lse_M, coefficient, V, 0, scale=scale, **factors)
    d_rows = torch.mm(raw, weight) if needs[0] else rows.new_empty(0)
    d_weight = torch.mm(raw.t(), rows) if needs[1] else rows.new_empty(0)
    d_bias = raw.sum(0, dtype=torch.float32).to(rows.dtype) if needs[2] else rows.new_empty(0)
    return nll_M, d_rows, d_weight, d_bias


def _fake_whole(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    coefficient: Tensor,
    softcap: float | None,
    scale: float | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (rows.shape, weight.shape, weight.shape[:1])
    d_rows, d_weight, d_bias = (rows.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))
    return rows.new_empty(rows.shape[0], dtype=torch.float32), d_rows, d_weight, d_bias


_forward = register(
    "linear_cross_entropy(Tensor rows, Tensor weight, Tensor targets, Tensor? bias, float? softcap, float? scale)"
    " -> (Tensor, Tensor)",
    _launch,
    _fake,
)
_gradient = register(
    "linear_cross_entropy_gradient(Tensor rows, Tensor weight, Tensor targets, Tensor? bias, Tensor lse,"
    " Tensor upstream, float? softcap, float? scale, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _launch_gradient,
    _fake_gradient,
)


_whole = register(
    "linear_cross_entropy_whole(Tensor rows, Tensor weight, Tensor targets, Tensor? bias, Tensor coefficient,"
    " float? softcap, float? scale, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_whole,
    _fake_whole,
)


class _SumLoss(torch.autograd.Function):
    """Weighted sum of the rows' nll, whose gradients are made beside it and scaled by the upstream number."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        coefficient: Tensor,
        softcap: float | None,
        scale: float | None,
    ) -> Tensor:
        needs = list(ctx.needs_input_grad[:3])
        nll, *grads = _whole(rows, weight, targets, bias, coefficient, softcap, scale, needs)
        ctx.save_for_backward(*(grad if need else None for grad, need in zip(grads, needs, strict=True)))
        return (torch.where(coefficient == 0, 0.0, nll) * coefficient).sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if grad is None else grad * upstream.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None


def _fits_whole(rows: Tensor, weight: Tensor, bias: Tensor | None, reduction: str) -> bool:
    """Whether to make gradients beside the loss: not in float16, where an upstream loss scale would come too late."""
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (rows, weight, bias))
    small = 0 < rows.shape[0] * weight.shape[0] <= WHOLE_ELEMENTS
    return reduction == "sum" and differentiable and small and rows.dtype != torch.float16


class _RowLoss(torch.autograd.Function):
    """nll [M] of the rows; what is done with it is left to autograd, so that any upstream gradient is right."""

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
        needs = list(ctx.needs_input_grad[:3])
        upstream = upstream.contiguous()
        grads = _gradient(*ctx.saved_tensors, upstream, *ctx.factors, needs)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None, None, None


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_index: Tensor | None,
    row_weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    check_float("hidden", hidden, 2)
    check_float("weight", weight, 2)
    N, H = hidden.shape
    if weight.shape[1] != H:
        raise ValueError(f"weight must be [V, {H}] for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}")
    check_vocabulary("weight", weight.shape[0])
    check_index("targets", targets, (N,))
    if row_index is not None:
        check_index("row_index", row_index, tuple(row_index.shape[:1]) or (0,))
    M = N if row_index is None else row_index.shape[0]
    if row_weight is not None and (row_weight.dim() != 1 or row_weight.shape[0] not in (M, N)):
        raise ValueError(f"row_weight must have shape ({M},) or ({N},), got {tuple(row_weight.shape)}")
    if row_weight is not None and row_weight.requires_grad:
        raise ValueError("row_weight requires a gradient but is used as a constant; pass row_weight.detach()")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
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
) -> Tensor:
    """Weighted cross-entropy of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`` on chosen rows.

    Exact: nothing is filtered or approximated. Memory beyond the gradients is a few rows' worth of logits, or the
    logits of the chosen rows where the loss is a sum and they are no more than 2**29 (except in float16); the gradient
    of ``weight`` is accumulated in float32 and rounded once.

    Args:
        hidden: Final hidden states, shape ``[N, H]``, float32, float16 or bfloat16.
        weight: The head's matrix, shape ``[V, H]``, dtype of ``hidden`` unless autocast is on.
        targets: Class of each row, shape ``[N]``, int64. A class outside ``[0, V)`` makes the loss NaN.
        row_index: Rows to use, shape ``[M]``, int64; ``None`` for all. A row outside ``[0, N)`` makes the loss NaN.
        row_weight: Factor on each used row's loss, a constant, shape ``[M]`` or ``[N]``. Rows of weight 0 give no loss
            and no gradient whatever they hold.
        bias: The head's bias, shape ``[V]``.
        softcap: Bound of the logits; ``None`` for none.
        scale: Factor on the logits before the softcap; ``None`` for 1.
        ignore_index: Target of rows that count for nothing.
        reduction: ``"sum"`` for a scalar, ``"none"`` for the weighted loss of each used row.

    Returns:
        float32, 0-dim or ``[M]``; differentiable in ``hidden``, ``weight`` and ``bias``.

    Raises:
        TypeError: If a dtype is not accepted, or those of ``hidden`` and ``weight`` differ.
        ValueError: If shapes or devices do not fit, or ``reduction`` is unknown.

    Example:
        >>> hidden = torch.zeros(3, 8, device="cuda")
        >>> linear_cross_entropy(hidden, torch.zeros(4, 8, device="cuda"), torch.tensor([1, -100, 2], device="cuda"))
        tensor(2.7726, device='cuda:0')
    """
    _check(hidden, weight, targets, row_index, row_weight, bias)
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be a positive number or None, got {value}")
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight is {weight.dtype} and hidden is {hidden.dtype}; cast them to one dtype")
    bias = None if bias is None else bias.to(hidden.dtype)
    with torch.autocast(device_type, enabled=False):
        rows, targets, coefficient = _kept_rows(hidden, targets, row_index, row_weight, ignore_index)
        rows, weight, targets = rows.contiguous(), weight.contiguous(), targets.contiguous()
        if _fits_whole(rows, weight, bias, reduction):
            return _SumLoss.apply(rows, weight, bias, targets, coefficient.contiguous(), softcap, scale)
        nll = _RowLoss.apply(rows, weight, bias, targets, softcap, scale)
        loss = torch.where(coefficient == 0, 0.0, nll) * coefficient
    return loss.sum() if reduction == "sum" else loss
