"""Losses and logit gradients of a head, a chunk of its columns at a time."""

import triton
import triton.language as tl

# Finite stand-in for -inf, so that the difference of two of them is not NaN.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def _softcapped(raw, inner, HAS_SOFTCAP: tl.constexpr):
    """tanh(raw * inner) with a softcap, else ``raw``: the logits without their outer factor."""
    if HAS_SOFTCAP:
        raw = 2.0 * tl.sigmoid(2.0 * inner * raw) - 1.0
    return raw


@triton.jit
def chunk_lse_kernel(
    raw_ptr,
    targets_ptr,
    state_ptr,
    M,
    C,
    column,
    unit,
    inner,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold columns [column, column + C) of the head's output into each row's running maximum, sum and target logit.

    ``state`` is [3, M] float32, in base 2; one program per row.
    """
    row = tl.program_id(0).to(tl.int64)
    peak = tl.load(state_ptr + row)
    z = tl.load(state_ptr + M + row)
    raw_ptr += row * C
    for start in range(0, C, BLOCK):
        place = start + tl.arange(0, BLOCK)
        raw = tl.load(raw_ptr + place, mask=place < C, other=-float("inf")).to(tl.float32)
        x = _softcapped(raw, inner, HAS_SOFTCAP) * unit
        if HAS_SOFTCAP:
            x = tl.where(place < C, x, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(x, 0))
        z = z * tl.exp2(peak - new_peak) + tl.sum(tl.exp2(x - new_peak), 0)
        peak = new_peak
    tl.store(state_ptr + row, peak)
    tl.store(state_ptr + M + row, z)
    place = tl.load(targets_ptr + row) - column
    if (place >= 0) & (place < C):
        raw_y = tl.load(raw_ptr + place).to(tl.float32)
        tl.store(state_ptr + 2 * M + row, _softcapped(raw_y, inner, HAS_SOFTCAP) * unit)


@triton.jit
def chunk_gradient_kernel(
    raw_ptr,
    out_ptr,
    targets_ptr,
    lse_ptr,
    upstream_ptr,
    C,
    column,
    unit,
    inner,
    scale,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Upstream * d nll / d raw of the head's output ``raw`` [M, C], in place or elsewhere; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    upstream = tl.load(upstream_ptr + row) * scale
    lse = tl.load(lse_ptr + row)
    target = tl.load(targets_ptr + row) - column
    raw_ptr += row * C
    out_ptr += row * C
    for start in range(0, C, BLOCK):
        place = start + tl.arange(0, BLOCK)
        raw = tl.load(raw_ptr + place, mask=place < C, other=0.0).to(tl.float32)
        squashed = _softcapped(raw, inner, HAS_SOFTCAP)
        grad = tl.exp2(squashed * unit - lse) - tl.where(place == target, 1.0, 0.0)
        if HAS_SOFTCAP:
            grad = grad * (1.0 - squashed * squashed)
        # A row of weight 0 gives 0 whatever its logits.
        grad = tl.where(upstream == 0.0, 0.0, grad * upstream)
        tl.store(out_ptr + place, grad.to(out_ptr.dtype.element_ty), mask=place < C)
