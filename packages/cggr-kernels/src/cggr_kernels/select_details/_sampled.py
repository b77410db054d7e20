"""Probabilities proportional to scores, and systematic sampling with them."""

import triton
import triton.language as tl

from cggr_kernels.select_details._stratified import CERTAIN, SMALLEST, TINY
from cggr_kernels.select_details._uniform import systematic_start


@triton.jit
def _mixed_size(score, mean, MIX: tl.constexpr):
    """Sizes of scores in float32, 0 for the -1 of tokens that are not countable."""
    size = tl.where(mean > 0.0, (1.0 - MIX) * score.to(tl.float64) + (MIX + TINY) * mean, 1.0)
    return tl.where(score < 0.0, 0.0, size)


@triton.jit
def size_kernel(score_ptr, mean_ptr, size_ptr, S, MIX: tl.constexpr, BLOCK: tl.constexpr):
    """Sizes of ``score`` [B, S]. MIX is a constant because a float argument would be rounded to float32."""
    b = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(score_ptr + b * S + place, mask=place < S, other=-1.0)
    tl.store(size_ptr + b * S + place, _mixed_size(score, tl.load(mean_ptr + b), MIX), mask=place < S)


@triton.jit
def capped_kernel(size_ptr, tail_ptr, kept_ptr, partial_ptr, S, blocks, BLOCK: tl.constexpr):
    """Number of entries of each block taken with certainty: (k - number of larger) * size > sum of it and smaller ones.

    ``size`` ascends in each row, so that sum is the cumulative one, ``tail``.
    """
    b = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < S
    size = tl.load(size_ptr + b * S + place, mask=inside, other=0.0)
    tail = tl.load(tail_ptr + b * S + place, mask=inside, other=0.0)
    left = tl.load(kept_ptr + b) - (S - 1 - place)
    capped = inside & (left.to(tl.float64) * size > tail)
    tl.store(partial_ptr + b * blocks + tl.program_id(0), tl.sum(capped.to(tl.int32), 0))


@triton.jit
def factor_kernel(size_ptr, tail_ptr, capped_ptr, kept_ptr, factor_ptr, S):
    """For each row, the factor c of the probabilities ``min(1, c * size)``, and the smallest size that is capped."""
    b = tl.program_id(0).to(tl.int64)
    capped = tl.load(capped_ptr + b)
    tail = tl.load(tail_ptr + b * S + S - 1 - capped, mask=capped < S, other=0.0)
    smallest = tl.load(size_ptr + b * S + S - capped, mask=capped > 0, other=float("inf"))
    left = (tl.load(kept_ptr + b) - capped).to(tl.float64)
    tl.store(factor_ptr + 2 * b, left / tl.maximum(tail, tl.full([], SMALLEST, tl.float64)))
    tl.store(factor_ptr + 2 * b + 1, smallest)


@triton.jit
def _probability(score_ptr, mean_ptr, factor_ptr, b, place, S, MIX: tl.constexpr):
    score = tl.load(score_ptr + b * S + place, mask=place < S, other=-1.0)
    size = _mixed_size(score, tl.load(mean_ptr + b), MIX)
    scaled = tl.minimum(tl.load(factor_ptr + 2 * b) * size, 1.0)
    return tl.where(score < 0.0, 0.0, tl.where(size >= tl.load(factor_ptr + 2 * b + 1), 1.0, scaled))


@triton.jit
def probability_kernel(
    score_ptr, mean_ptr, factor_ptr, step_ptr, partial_ptr, S, blocks, MIX: tl.constexpr, BLOCK: tl.constexpr
):
    """Steps of the systematic walk: the probabilities, 0 where certain; and each block's number of certain entries."""
    b = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pi = _probability(score_ptr, mean_ptr, factor_ptr, b, place, S, MIX)
    certain = pi >= tl.full([], CERTAIN, tl.float64)
    tl.store(step_ptr + b * S + place, tl.where(certain, 0.0, pi), mask=place < S)
    tl.store(partial_ptr + b * blocks + tl.program_id(0), tl.sum(certain.to(tl.int32), 0))


@triton.jit
def sampled_walk_kernel(
    score_ptr,
    mean_ptr,
    factor_ptr,
    cumulated_ptr,
    certain_ptr,
    kept_ptr,
    draw_ptr,
    keep_ptr,
    weight_ptr,
    seed_step,
    first_row_ptr,
    S,
    MIX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Systematic sampling in position order: mark the chosen positions and weight them by 1 / probability."""
    b = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < S
    pi = _probability(score_ptr, mean_ptr, factor_ptr, b, place, S, MIX)
    total = tl.load(cumulated_ptr + b * S + S - 1)
    up_to = tl.load(cumulated_ptr + b * S + place, mask=inside, other=0.0)
    before = tl.load(cumulated_ptr + b * S + place - 1, mask=inside & (place > 0), other=0.0)
    limit = (tl.load(kept_ptr + b) - tl.load(certain_ptr + b)).to(tl.float64)
    factor = limit / tl.maximum(total, tl.full([], SMALLEST, tl.float64))
    u = systematic_start(tl.load(first_row_ptr) + b, draw_ptr, seed_step)
    upper = tl.ceil(tl.where(up_to >= total, limit, tl.minimum(up_to * factor, limit)) - u)
    lower = tl.ceil(tl.where(before >= total, limit, tl.minimum(before * factor, limit)) - u)
    lower = tl.where(place == 0, 0.0, lower)
    chosen = inside & ((pi >= tl.full([], CERTAIN, tl.float64)) | (upper > lower))
    tl.store(keep_ptr + b * S + place, chosen.to(tl.int8), mask=inside)
    weight = tl.where(chosen, 1.0 / tl.maximum(pi, 1.1754943508222875e-38), 0.0)
    tl.store(weight_ptr + b * S + place, weight.to(tl.float32), mask=inside)
