"""Cross-entropy of a head on chosen rows, without the logits of all classes at any time.

The logits are made for a chunk of the classes at a time, by the vendor's matrix product, into one small buffer that two
kernels read while it is in the cache. Chunks of classes, not of rows, because the gradient of the head's weight is then
complete chunk by chunk: it is accumulated in float32 inside one product and written once, and no float32 copy of the
weight exists. The price is that the gradients need the logits again.

For a sum the gradients are made beside the loss, and the memory of the weight's gradient holds logits until it is
written: of the chunks whose logits fit there, one in every M / H, they are not made twice. Who has the memory lets all
logits be held at once: one chunk, one matrix product of four less.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from cggr_kernels.linear_cross_entropy_details._chunk import LOWEST, chunk_gradient_kernel, chunk_lse_kernel
from cggr_kernels.linear_cross_entropy_details._scale import scale_kernel

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
# Logits held at once: 2**24 of two bytes stay in the 50 MB cache of an H100 or H200. Not fewer columns than keep the
# products efficient, however many rows there are.
CHUNK_ELEMENTS = 2**24
MIN_COLUMNS = 4096
_BLOCK = 4096
_SCALE_STEPS = 16


def _factors(softcap: float | None, scale: float | None) -> dict[str, Any]:
    scale = 1.0 if scale is None else scale
    return {
        "unit": (scale if softcap is None else softcap) * LOG2E,
        "inner": 1.0 if softcap is None else scale / softcap,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK": _BLOCK,
        "num_warps": 8,
    }


def _chunks(M: int, V: int, max_logits: int = 0) -> list[tuple[int, int]]:
    if max_logits >= M * V:
        return [(0, V)]
    columns = min(V, max(MIN_COLUMNS, CHUNK_ELEMENTS // max(M, 1) // 256 * 256))
    return [(start, min(start + columns, V)) for start in range(0, V, columns)]


def _raw(buffer: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, start: int, end: int) -> Tensor:
    """Columns [start, end) of the head's output, contiguous, in the buffer."""
    M = rows.shape[0]
    out = buffer[: M * (end - start)].view(M, end - start)
    if bias is None:
        return torch.mm(rows, weight[start:end].t(), out=out)
    return torch.addmm(bias[start:end], rows, weight[start:end].t(), out=out)


def _read(
    raw: Tensor, targets: Tensor, state: Tensor, start: int, end: int, softcap: float | None, scale: float | None
) -> None:
    """Take the columns [start, end) into the running state [3, M] of the rows."""
    M = raw.shape[0]
    chunk_lse_kernel[(M,)](raw, targets, state, M, end - start, start, **_factors(softcap, scale))


def _start(M: int, device: torch.device) -> Tensor:
    """State of rows that have read nothing: maximum, sum, and the logit of the target, NaN if it never comes."""
    state_3M = torch.empty(3, M, dtype=torch.float32, device=device)
    state_3M[0], state_3M[1], state_3M[2] = LOWEST.value, 0.0, torch.nan
    return state_3M


def _finish(state: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [M] and log-sum-exp in base 2 [M]."""
    lse_M = state[0] + state[1].log2()
    return (lse_M - state[2]) * LN2, lse_M


def launch_forward(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    M, V = rows.shape[0], weight.shape[0]
    state_3M = _start(M, rows.device)
    if M:
        chunks = _chunks(M, V)
        buffer = torch.empty(M * chunks[0][1], dtype=rows.dtype, device=rows.device)
        for start, end in chunks:
            _read(_raw(buffer, rows, weight, bias, start, end), targets, state_3M, start, end, softcap, scale)
    return _finish(state_3M)


def fake_forward(
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


class _Gradients:
    """Gradients of rows, weight and bias, complete once every chunk was added; empty where they are not needed."""

    def __init__(self, rows: Tensor, weight: Tensor, needs: list[bool]) -> None:
        create = torch.empty if rows.shape[0] else torch.zeros
        self.rows, self.weight, self.needs = rows, weight, needs
        self.d_weight = create(weight.shape if needs[1] else 0, dtype=weight.dtype, device=rows.device)
        self.d_bias = create(weight.shape[0] if needs[2] else 0, dtype=torch.float32, device=rows.device)
        self.d_rows = torch.zeros(rows.shape if needs[0] else 0, dtype=torch.float32, device=rows.device)

    def add(self, d_raw: Tensor, start: int, end: int) -> None:
        """Add what the gradient of the head's output in the columns [start, end) gives."""
        if self.needs[0]:
            _add_product(self.d_rows, d_raw, self.weight[start:end])
        if self.needs[1]:
            torch.mm(d_raw.t(), self.rows, out=self.d_weight[start:end])
        if self.needs[2]:
            torch.sum(d_raw, 0, dtype=torch.float32, out=self.d_bias[start:end])

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients in the dtype of the rows."""
        return self.d_rows.to(self.rows.dtype), self.d_weight, self.d_bias.to(self.rows.dtype)


def _differentiate(
    raw: Tensor,
    out: Tensor,
    targets: Tensor,
    lse: Tensor,
    upstream: Tensor,
    start: int,
    softcap: float | None,
    scale: float | None,
) -> Tensor:
    """Gradient of the head's output ``raw`` [M, C], in the buffer ``out``, which may be where ``raw`` is."""
    M, C = raw.shape
    chunk_gradient_kernel[(M,)](
        raw,
        out,
        targets,
        lse,
        upstream,
        C,
        start,
        scale=1.0 if scale is None else scale,
        **_factors(softcap, scale),
    )
    return out[: raw.numel()].view(M, C)


def launch_gradient(
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
    gradients = _Gradients(rows, weight, needs)
    if M:
        chunks = _chunks(M, V)
        raw = buffer = torch.empty(M * chunks[0][1], dtype=rows.dtype, device=rows.device)
        for start, end in chunks:
            raw = _raw(buffer, rows, weight, bias, start, end)
            gradients.add(_differentiate(raw, buffer, targets, lse, upstream, start, softcap, scale), start, end)
        del buffer, raw
    return gradients.result()


def fake_gradient(
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


def launch_sum(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    coefficient: Tensor,
    softcap: float | None,
    scale: float | None,
    max_logits: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (M, H), V = rows.shape, weight.shape[0]
    gradients = _Gradients(rows, weight, needs)
    state_3M = _start(M, rows.device)
    chunks = _chunks(M, V, max_logits)
    raw = buffer = torch.empty(M * chunks[0][1], dtype=rows.dtype, device=rows.device)
    kept = {}
    for number, (start, end) in enumerate(chunks):
        # The logits of a chunk take the place of M / H chunks of the weight's gradient, its own first: they are used
        # up before any of those is written.
        place = gradients.d_weight.view(-1)[start * H :]
        fits = number % -(-M // H) == 0 and place.numel() >= M * (end - start)
        raw = _raw(place if fits else buffer, rows, weight, bias, start, end)
        if fits or len(chunks) == 1:
            kept[start] = raw
        _read(raw, targets, state_3M, start, end, softcap, scale)
    nll_M, lse_M = _finish(state_3M)
    for start, end in chunks:
        raw = kept.pop(start) if start in kept else _raw(buffer, rows, weight, bias, start, end)
        gradients.add(_differentiate(raw, buffer, targets, lse_M, coefficient, start, softcap, scale), start, end)
    del buffer, raw
    return nll_M, *gradients.result()


def fake_sum(
    rows: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    coefficient: Tensor,
    softcap: float | None,
    scale: float | None,
    max_logits: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (rows.shape, weight.shape, weight.shape[:1])
    d_rows, d_weight, d_bias = (rows.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))
    return rows.new_empty(rows.shape[0], dtype=torch.float32), d_rows, d_weight, d_bias


def launch_scale(x: Tensor, factor: Tensor) -> None:
    """``x *= factor`` in place, as autograd must know of it."""
    if x.numel():
        grid = (triton.cdiv(x.numel(), _SCALE_STEPS * _BLOCK),)
        scale_kernel[grid](x, factor, x.numel(), STEPS=_SCALE_STEPS, BLOCK=_BLOCK, num_warps=8)
    torch.autograd.graph.increment_version(x)


def fake_scale(x: Tensor, factor: Tensor) -> None:
    """Nothing."""
