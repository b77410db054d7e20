"""Casts rows to float8_e4m3fn, each scaled by its largest absolute value."""

import triton
import triton.language as tl


@triton.jit
def _load(x_ptr, up_ptr, row, K, place, GATED: tl.constexpr):
    """A part of a row in float32: ``x``, or ``silu(x) * up``."""
    mask = place < K
    x = tl.load(x_ptr + row * K + place, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(up_ptr + row * K + place, mask=mask, other=0.0).to(tl.float32)
        x = x * tl.sigmoid(x) * up
    return x


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    up_ptr,
    out_ptr,
    scale_ptr,
    K,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    GATED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row, read once if it fits in a block (``WHOLE``), else twice."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    x = _load(x_ptr, up_ptr, row, K, part, GATED)
    largest = tl.max(tl.abs(x))
    if not WHOLE:
        for start in range(BLOCK, K, BLOCK):
            more = _load(x_ptr, up_ptr, row, K, start + part, GATED)
            largest = tl.maximum(largest, tl.max(tl.abs(more)))
    largest = tl.maximum(largest, SMALLEST)
    tl.store(scale_ptr + row, tl.div_rn(largest, LARGEST))
    factor = tl.div_rn(LARGEST, largest)
    kind = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * K + part, (x * factor).to(kind), mask=part < K)
    if not WHOLE:
        for start in range(BLOCK, K, BLOCK):
            place = start + part
            more = _load(x_ptr, up_ptr, row, K, place, GATED)
            tl.store(out_ptr + row * K + place, (more * factor).to(kind), mask=place < K)
