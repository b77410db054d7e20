"""Which keys which queries see."""

import triton
import triton.language as tl


@triton.jit
def first_key_of_segments(segment_ptr, lowest, highest, start, end, CHUNK: tl.constexpr):
    """First key in [start, end) whose segment lies in [lowest, highest], or ``end``; segments in any order."""
    first = end
    for offset in range(start, end, CHUNK):
        key = offset + tl.arange(0, CHUNK)
        segment = tl.load(segment_ptr + key, mask=key < end, other=-1).to(tl.int32)
        hit = (segment >= lowest) & (segment <= highest) & (key < end)
        first = tl.minimum(first, tl.min(tl.where(hit, key, end), 0))
    return first


@triton.jit
def key_range(
    position,
    query_segment,
    row_ok,
    segment_ptr,
    S,
    window,
    HAS_SEGMENT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Keys that a block of queries needs: [start, full) is seen by all of them, [full, end) by some."""
    lowest_position = tl.min(tl.where(row_ok, position, S), 0)
    end = tl.max(position, 0) + 1
    start = 0
    full = lowest_position + 1
    if HAS_WINDOW:
        start = tl.maximum(lowest_position - window + 1, 0)
        full = 0
    if HAS_SEGMENT:
        lowest = tl.min(tl.where(query_segment >= 0, query_segment, 2147483647), 0)
        start = first_key_of_segments(segment_ptr, lowest, tl.max(query_segment, 0), start, end, CHUNK)
        full = 0
    start = start // BLOCK_N * BLOCK_N
    return start, tl.maximum(full // BLOCK_N * BLOCK_N, start), end


@triton.jit
def visible(
    position, query_segment, key, key_segment, key_ok, window, HAS_SEGMENT: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """Which keys which queries see; the arguments broadcast, positions and segments of absent rows are -1."""
    seen = (key <= position) & key_ok
    if HAS_WINDOW:
        seen = seen & (position - key < window)
    if HAS_SEGMENT:
        seen = seen & (query_segment == key_segment) & (query_segment >= 0)
    return seen


@triton.jit
def capped(raw, inner):
    """tanh(raw * inner), from the exponential that every backend has."""
    return 2.0 * tl.sigmoid(2.0 * inner * raw) - 1.0


@triton.jit
def in_registers(x, BLOCK_D: tl.constexpr):
    """``x`` times the identity: the left side of a product stays in registers only if it comes out of a product.

    From shared memory it would be read again for every block of keys, which a Hopper GPU has too little bandwidth for.
    """
    d = tl.arange(0, BLOCK_D)
    return tl.dot(x, (d[:, None] == d[None, :]).to(x.dtype)).to(x.dtype)
