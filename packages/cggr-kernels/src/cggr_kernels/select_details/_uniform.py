"""Counter-based random numbers."""

import triton
import triton.language as tl

# As in the reference: distance from one row's random numbers to the next row's, and offset of the numbers drawn once
# per row.
ROW_STRIDE: tl.constexpr = tl.constexpr(1 << 32)
ROW_STARTS: tl.constexpr = tl.constexpr(1 << 62)


@triton.jit
def _mix(x):
    """Output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ (x >> 30)) * tl.full([], 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full([], 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def uniform(position, draw_ptr, seed_step):
    """Number in (0, 1) for each position (int64), float64; the same as ``cggr_core.randomness.uniform``."""
    golden = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    counter = tl.load(draw_ptr).to(tl.uint64)
    key = _mix(_mix(counter * golden + seed_step.to(tl.uint64)) + golden)
    bits = _mix(position.to(tl.uint64) * golden + key) >> 12
    return (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16


@triton.jit
def systematic_start(row, draw_ptr, seed_step):
    """Start of a row's systematic walk, in (0, 1); never where a cumulative probability can fall by design."""
    u = uniform(row + ROW_STARTS, draw_ptr, seed_step)
    return (tl.floor(u * 4294967296.0) + 0.5) * 2.3283064365386963e-10


@triton.jit
def uniform_kernel(draw_ptr, out_ptr, seed_step, first_row_ptr, S, n, BLOCK: tl.constexpr):
    """Random numbers of ``n`` positions in rows of S."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    position = (tl.load(first_row_ptr) + place // S) * ROW_STRIDE + place % S
    tl.store(out_ptr + place, uniform(position, draw_ptr, seed_step), mask=place < n)
