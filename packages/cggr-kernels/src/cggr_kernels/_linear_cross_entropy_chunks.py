"""Cross-entropy of a head on chosen rows, without ever holding the logits of all classes.

The vendor's matrix product computes the logits of a chunk of classes at a time into one small buffer, which two kernels
read while it is in the cache. Chunking by class, not by row, completes the gradient of the head's weight chunk by
chunk: it is accumulated in float32 inside one product and written once, and no float32 copy of the weight exists. In
return, the gradients need the logits again.
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
# Logits held at once: 2**24 of two bytes fit in the 50 MB cache of an H100 or H200. With many rows, a chunk still has
# enough columns to keep the products efficient.
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


def chunk_columns(M: int, V: int) -> int:
    """Classes whose logits are held at once."""
    return min(V, max(MIN_COLUMNS, CHUNK_ELEMENTS // max(M, 1) // 256 * 256))


def chunks(start: int, end: int, columns: int) -> list[tuple[int, int]]:
    """The classes [start, end) in chunks."""
    return [(first, min(first + columns, end)) for first in range(start, end, columns)]


def raw_logits(buffer: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, start: int, end: int) -> Tensor:
    """Columns [start, end) of the head's output, contiguous, in the buffer."""
    M = rows.shape[0]
    out = buffer[: M * (end - start)].view(M, end - start)
    if bias is None:
        return torch.mm(rows, weight[start:end].t(), out=out)
    return torch.addmm(bias[start:end], rows, weight[start:end].t(), out=out)


def read_logits(
    raw: Tensor, targets: Tensor, state: Tensor, start: int, end: int, softcap: float | None, scale: float | None
) -> None:
    """Update the running state [3, M] of the rows with the columns [start, end)."""
    M = raw.shape[0]
    chunk_lse_kernel[(M,)](raw, targets, state, M, end - start, start, **_factors(softcap, scale))


def start_state(M: int, device: torch.device) -> Tensor:
    """Initial state: maximum, sum, and the logit of the target (NaN if it never comes)."""
    state_3M = torch.empty(3, M, dtype=torch.float32, device=device)
    state_3M[0], state_3M[1], state_3M[2] = LOWEST.value, 0.0, torch.nan
    return state_3M


def finish_state(state: Tensor) -> tuple[Tensor, Tensor]:
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
    state_3M = start_state(M, rows.device)
    if M:
        columns = chunk_columns(M, V)
        buffer = torch.empty(M * columns, dtype=rows.dtype, device=rows.device)
        for start, end in chunks(0, V, columns):
            read_logits(
                raw_logits(buffer, rows, weight, bias, start, end), targets, state_3M, start, end, softcap, scale
            )
    return finish_state(state_3M)


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


class Gradients:
    """Gradients of rows, weight and bias, complete once every chunk is added; empty if not needed."""

    def __init__(self, rows: Tensor, weight: Tensor, needs: list[bool], d_rows: Tensor) -> None:
        create = torch.empty if rows.shape[0] else torch.zeros
        self.rows, self.weight, self.needs = rows, weight, needs
        self.d_rows = d_rows.zero_()
        self.d_weight = create(weight.shape if needs[1] else 0, dtype=weight.dtype, device=rows.device)
        self.d_bias = create(weight.shape[0] if needs[2] else 0, dtype=torch.float32, device=rows.device)

    def add(self, d_raw: Tensor, start: int, end: int) -> None:
        """Add the contribution of the gradient of the head's output in the columns [start, end)."""
        if self.needs[0]:
            _add_product(self.d_rows, d_raw, self.weight[start:end])
        if self.needs[1]:
            torch.mm(d_raw.t(), self.rows, out=self.d_weight[start:end])
        if self.needs[2]:
            torch.sum(d_raw, 0, dtype=torch.float32, out=self.d_bias[start:end])


def differentiate(
    raw: Tensor,
    out: Tensor,
    targets: Tensor,
    lse: Tensor,
    upstream: Tensor,
    start: int,
    softcap: float | None,
    scale: float | None,
) -> Tensor:
    """Gradient of the head's output ``raw`` [M, C], in the buffer ``out``, which may share memory with ``raw``."""
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
    d_rows = rows.new_empty(rows.shape if needs[0] else 0, dtype=torch.float32)
    gradients = Gradients(rows, weight, needs, d_rows)
    if M:
        columns = chunk_columns(M, V)
        raw = buffer = torch.empty(M * columns, dtype=rows.dtype, device=rows.device)
        for start, end in chunks(0, V, columns):
            raw = raw_logits(buffer, rows, weight, bias, start, end)
            gradients.add(differentiate(raw, buffer, targets, lse, upstream, start, softcap, scale), start, end)
        del buffer, raw
    return d_rows.to(rows.dtype), gradients.d_weight, gradients.d_bias.to(rows.dtype)


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


def launch_scale(x: Tensor, factor: Tensor) -> None:
    """``x *= factor`` in place, as an op visible to autograd."""
    if x.numel():
        grid = (triton.cdiv(x.numel(), _SCALE_STEPS * _BLOCK),)
        scale_kernel[grid](x, factor, x.numel(), STEPS=_SCALE_STEPS, BLOCK=_BLOCK, num_warps=8)
    torch.autograd.graph.increment_version(x)


def fake_scale(x: Tensor, factor: Tensor) -> None:
    """Nothing."""
