"""Which keys each query sees."""

import triton
import triton.language as tl


@triton.jit
def keys_of_segments(segment_ptr, lowest, highest, full, end, CHUNK: tl.constexpr):
    """First key below ``end`` with a segment in [lowest, highest], and the first from which all below ``full`` agree.

    Segments may be in any order. The first result is ``end`` if there is no such key; from the second on, all keys are
    of segment ``highest``.
    """
    first = end
    alike = 0
    for offset in range(0, end, CHUNK):
        key = offset + tl.arange(0, CHUNK)
        segment = tl.load(segment_ptr + key, mask=key < end, other=-1).to(tl.int32)
        hit = (segment >= lowest) & (segment <= highest) & (key < end)
        first = tl.minimum(first, tl.min(tl.where(hit, key, end), 0))
        alike = tl.maximum(alike, tl.max(tl.where((segment != highest) & (key < full), key + 1, 0), 0))
    return first, alike


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
    """Keys that a block of queries needs, [start, end): all queries see [free, full), some of them see the rest."""
    lowest_position = tl.min(tl.where(row_ok, position, S), 0)
    end = tl.max(position, 0) + 1
    start = 0
    full = lowest_position + 1
    alike = 0
    if HAS_WINDOW:
        start = tl.maximum(lowest_position - window + 1, 0)
        full = 0
    if HAS_SEGMENT:
        lowest = tl.min(tl.where(query_segment >= 0, query_segment, 2147483647), 0)
        highest = tl.max(query_segment, 0)
        first, alike = keys_of_segments(segment_ptr, lowest, highest, full, end, CHUNK)
        start = tl.maximum(start, first)
        one_segment = (tl.min(tl.where(row_ok, query_segment, 2147483647), 0) == highest) & (highest >= 0)
        full = tl.where(one_segment, full, 0)
    start = start // BLOCK_N * BLOCK_N
    free = tl.maximum((alike + BLOCK_N - 1) // BLOCK_N * BLOCK_N, start)
    full = tl.maximum(full // BLOCK_N * BLOCK_N, free)
    return start, free, full, end


@triton.jit
def visible(
    position, query_segment, key, key_segment, key_ok, window, HAS_SEGMENT: tl.constexpr, HAS_WINDOW: tl.constexpr
):
    """Whether a query sees a key; the arguments broadcast, and positions and segments of absent rows are -1."""
    seen = (key <= position) & key_ok
    if HAS_WINDOW:
        seen = seen & (position - key < window)
    if HAS_SEGMENT:
        seen = seen & (query_segment == key_segment) & (query_segment >= 0)
    return seen


@triton.jit
def capped(raw, inner):
    """tanh(raw * inner), computed from the exponential, which every backend has."""
    return 2.0 * tl.sigmoid(2.0 * inner * raw) - 1.0


@triton.jit
def in_registers(x, BLOCK_D: tl.constexpr):
    """``x`` times the identity: the left operand of a product stays in registers only if it is a result of one.

    In shared memory, it would be read again for every block of keys, for which a Hopper GPU lacks the bandwidth.
    """
    d = tl.arange(0, BLOCK_D)
    return tl.dot(x, (d[:, None] == d[None, :]).to(x.dtype)).to(x.dtype)
