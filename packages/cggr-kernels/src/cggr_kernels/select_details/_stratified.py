"""Strata by score, their allocation, and systematic sampling along them."""

import triton
import triton.language as tl

from cggr_kernels.select_details._uniform import ROW_STRIDE, systematic_start, uniform

# A stratum with at least this probability is taken whole; see the reference.
CERTAIN: tl.constexpr = tl.constexpr(1.0 - 1e-9)
TINY: tl.constexpr = tl.constexpr(1e-12)
SMALLEST: tl.constexpr = tl.constexpr(2.2250738585072014e-308)


@triton.jit
def stratum_kernel(
    score_ptr,
    position_ptr,
    count_ptr,
    draw_ptr,
    key_ptr,
    partial_ptr,
    seed_step,
    first_row_ptr,
    S,
    blocks,
    STRATA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For scores in descending order: the sort key stratum + uniform, and each block's sums of squares by stratum."""
    b = tl.program_id(1).to(tl.int64)
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rank < S
    n = tl.load(count_ptr + b)
    stratum = tl.where(rank < n, rank.to(tl.int64) * STRATA // tl.maximum(n, 1), STRATA)
    position = tl.load(position_ptr + b * S + rank, mask=inside, other=0)
    key = stratum.to(tl.float64) + uniform((tl.load(first_row_ptr) + b) * ROW_STRIDE + position, draw_ptr, seed_step)
    tl.store(key_ptr + b * S + rank, key, mask=inside)
    score = tl.load(score_ptr + b * S + rank, mask=inside, other=0.0).to(tl.float64)
    score = tl.where(rank < n, tl.maximum(score, 0.0), 0.0)
    for h in tl.static_range(STRATA):
        square = tl.sum(tl.where(stratum == h, score * score, 0.0), 0)
        tl.store(partial_ptr + (b * blocks + tl.program_id(0)) * STRATA + h, square)


@triton.jit
def _end(h, n, STRATA: tl.constexpr):
    """Entries in the strata before h: the first rank r with r * STRATA // n >= h."""
    return (h * n + STRATA - 1) // STRATA


@triton.jit
def plan_kernel(square_ptr, count_ptr, kept_ptr, probability_ptr, MIX: tl.constexpr, STRATA: tl.constexpr):
    """Inclusion probability of each stratum of a row, from its sums of squares; one program per row.

    Entries of a stratum are alike, so the reference's search over entries becomes one over strata: a whole stratum is
    capped if (k - entries up to its end) * size > sum of the sizes after it. MIX is a constant because a float argument
    would be rounded to float32.
    """
    b = tl.program_id(0).to(tl.int64)
    n = tl.load(count_ptr + b)
    k = tl.load(kept_ptr + b)
    total = tl.zeros([], tl.float64)
    for h in tl.static_range(STRATA):
        members = _end(h + 1, n, STRATA) - _end(h, n, STRATA)
        square = tl.load(square_ptr + b * STRATA + h)
        size = tl.sqrt(square / tl.maximum(members, 1).to(tl.float64))
        total += size * members.to(tl.float64)
    mean = total / tl.maximum(n, 1).to(tl.float64)
    tail = tl.zeros([], tl.float64)
    uncapped = tl.zeros([], tl.float64)
    capped = tl.zeros([], tl.int64)
    for step in tl.static_range(STRATA):
        h = STRATA - 1 - step
        end = _end(h + 1, n, STRATA)
        members = end - _end(h, n, STRATA)
        size = tl.sqrt(tl.load(square_ptr + b * STRATA + h) / tl.maximum(members, 1).to(tl.float64))
        size = tl.where(mean > 0.0, (1.0 - MIX) * size + (MIX + TINY) * mean, 1.0)
        is_capped = (k - end).to(tl.float64) * size > tail
        # Strata before a capped one are larger, and so capped too.
        capped = tl.maximum(capped, tl.where(is_capped & (members > 0), end, 0))
        tail += size * members.to(tl.float64)
        uncapped = tl.where(capped == 0, tail, uncapped)
    factor = (k - capped).to(tl.float64) / tl.maximum(uncapped, SMALLEST)
    for h in tl.static_range(STRATA):
        members = _end(h + 1, n, STRATA) - _end(h, n, STRATA)
        size = tl.sqrt(tl.load(square_ptr + b * STRATA + h) / tl.maximum(members, 1).to(tl.float64))
        size = tl.where(mean > 0.0, (1.0 - MIX) * size + (MIX + TINY) * mean, 1.0)
        probability = tl.where(_end(h + 1, n, STRATA) <= capped, 1.0, tl.minimum(factor * size, 1.0))
        tl.store(probability_ptr + b * STRATA + h, tl.where(members > 0, probability, 0.0))


@triton.jit
def walk_kernel(
    order_ptr,
    position_ptr,
    count_ptr,
    kept_ptr,
    probability_ptr,
    draw_ptr,
    keep_ptr,
    weight_ptr,
    seed_step,
    first_row_ptr,
    S,
    STRATA: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Systematic sampling along the walk: mark the chosen positions and weight them by 1 / probability."""
    b = tl.program_id(1).to(tl.int64)
    rank = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.load(count_ptr + b)
    left = tl.load(kept_ptr + b)
    # As a constant in a comparison it would be rounded to float32, and become 1.
    certain = tl.full([], CERTAIN, tl.float64)
    pi = tl.zeros([BLOCK], tl.float64)
    # Cumulative probability of the uncertain strata, up to and including each rank, and before it.
    up_to = tl.zeros([BLOCK], tl.float64)
    before = tl.zeros([BLOCK], tl.float64)
    total = tl.zeros([], tl.float64)
    last = tl.zeros([], tl.int64)
    for h in tl.static_range(STRATA):
        start = _end(h, n, STRATA)
        end = _end(h + 1, n, STRATA)
        p = tl.load(probability_ptr + b * STRATA + h)
        pi = tl.where((rank >= start) & (rank < end), p, pi)
        if p >= certain:
            left -= end - start
        elif end > start:
            up_to += tl.minimum(tl.maximum(rank + 1 - start, 0), end - start).to(tl.float64) * p
            before += tl.minimum(tl.maximum(rank - start, 0), end - start).to(tl.float64) * p
            total += (end - start).to(tl.float64) * p
            last = end
    u = systematic_start(tl.load(first_row_ptr) + b, draw_ptr, seed_step)
    limit = left.to(tl.float64)
    factor = limit / tl.maximum(total, SMALLEST)
    upper = tl.where(rank + 1 >= last, limit, tl.minimum(up_to * factor, limit))
    lower = tl.where(rank >= last, limit, tl.minimum(before * factor, limit))
    upper = tl.ceil(upper - u)
    lower = tl.where(rank == 0, 0.0, tl.ceil(lower - u))
    chosen = ((pi >= certain) | (upper > lower)) & (rank < n)
    order = tl.load(order_ptr + b * S + rank, mask=rank < S, other=0)
    position = tl.load(position_ptr + b * S + order, mask=rank < S, other=0)
    tl.store(keep_ptr + b * S + position, chosen.to(tl.int8), mask=rank < S)
    weight = tl.where(chosen, 1.0 / tl.maximum(pi, 1.1754943508222875e-38), 0.0)
    tl.store(weight_ptr + b * S + position, weight.to(tl.float32), mask=rank < S)
