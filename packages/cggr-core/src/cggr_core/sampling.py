"""Which tokens of each row are kept, and with what probability: the reference of the op ``select``."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cggr_core.backends import register_reference
from cggr_core.randomness import uniform

__all__ = ["compact", "descending_rank", "kept_counts", "select_reference"]

# A probability this close to 1 counts as 1. The systematic walk then has no step of 1 or more, so rounding cannot
# choose a token twice and make the count inexact.
_CERTAIN = 1.0 - 1e-9
# Stride between rows' random numbers, and offset of the numbers that each row has once. Both are fixed, so that a row's
# draws depend only on its number, not on its length or the rest of the batch.
_ROW_STRIDE = 1 << 32
_ROW_STARTS = 1 << 62
# Keeps the probability of every countable token above 0 when scores are 0 and nothing is mixed in.
_TINY = 1e-12


def kept_counts(countable: Tensor, ratio: float, capacity: int, at_least: int = 1) -> Tensor:
    """Tokens to keep in each row of ``countable`` [B, S]: ``round(ratio * n)``, at least ``at_least``, at most n."""
    n = countable.sum(1)
    k = (n.to(torch.float64) * ratio).round().to(torch.int64).clamp(min=at_least)
    return torch.minimum(k, n).clamp(max=capacity)


def descending_rank(score: Tensor, countable: Tensor) -> Tensor:
    """Rank of each entry in its row, 0 the highest; ties go to the lower position, uncountable entries come last."""
    order = score.masked_fill(~countable, -torch.inf).argsort(dim=1, descending=True, stable=True)
    positions = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, positions)


def compact(keep: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Positions of the kept entries of ``keep`` [B, S], filled up to ``capacity`` with entries that are not kept.

    Every row of ``keep`` has at most ``capacity`` entries, and ``capacity`` is at most S.

    Returns:
        ``index`` [B, capacity] int64, distinct and ascending in each row, and ``valid`` [B, capacity] bool.
    """
    B, S = keep.shape
    spare = capacity - keep.sum(1, keepdim=True)
    member = keep | ((~keep).cumsum(1) <= spare)
    # Entries that are not members all write to one slot past the end, which is cut off.
    slot = torch.where(member, member.cumsum(1) - 1, capacity)
    positions = torch.arange(S, device=keep.device).expand(B, S)
    index = torch.zeros(B, capacity + 1, dtype=torch.int64, device=keep.device)
    index = index.scatter_(1, slot, positions)[:, :capacity].contiguous()
    return index, keep.gather(1, index)


def _inclusion_probabilities(size: Tensor, countable: Tensor, k: Tensor) -> Tensor:
    """Probabilities ``min(1, c * size)`` that sum to ``k`` in each row; 0 where not countable.

    The number of entries capped at 1 is found in closed form: with the sizes descending and T_j the sum from the j-th
    on, j entries are capped for the smallest j with ``(k - j) * size_j <= T_j``.

    Args:
        size: [B, N] float64, above 0 where countable.
        countable: [B, N] bool.
        k: [B] int64, at most the number of countable entries.
    """
    size = size.masked_fill(~countable, 0.0)
    descending = size.sort(dim=1, descending=True).values
    tail = descending.flip(1).cumsum(1).flip(1)
    j = torch.arange(size.shape[1], device=size.device)
    capped = ((k[:, None] - j) * descending > tail).sum(1, keepdim=True)
    tail = torch.cat([tail, tail.new_zeros(tail.shape[0], 1)], dim=1).gather(1, capped)
    c = (k[:, None] - capped) / tail.clamp(min=torch.finfo(tail.dtype).tiny)
    # Where all are capped c is 0, but the capped ones must still come out as 1.
    threshold = torch.cat([descending, descending.new_zeros(descending.shape[0], 1)], dim=1)
    smallest_capped = threshold.gather(1, (capped - 1).clamp(min=0)).masked_fill(capped == 0, torch.inf)
    pi = torch.where(size >= smallest_capped, 1.0, (c * size).clamp(max=1.0))
    return pi.masked_fill(~countable, 0.0)


def _systematic(pi: Tensor, k: Tensor, start: Tensor) -> Tensor:
    """Systematic sampling (Madow 1949): walk the cumulated probabilities in steps of 1 from a random start.

    Exactly ``k`` entries of each row are chosen, the i-th with probability ``pi_i``.

    Args:
        pi: [B, N] float64 probabilities in the order of the walk, summing to ``k`` in each row.
        k: [B] int64.
        start: [B] float64 in (0, 1).

    Returns:
        [B, N] bool.
    """
    certain = pi >= _CERTAIN
    left = (k - certain.sum(1))[:, None].to(pi.dtype)
    cumulated = pi.masked_fill(certain, 0.0).cumsum(1)
    total = cumulated[:, -1:]
    scaled = torch.minimum(cumulated * (left / total.clamp(min=torch.finfo(pi.dtype).tiny)), left)
    # The end is exact, whatever the sum was rounded to; entries after the last possible one cannot be chosen.
    scaled = torch.where(cumulated >= total, left, scaled)
    # 32 bits of the start, so that `left - start` is exact and the last step lands where it should.
    start = ((start * 2.0**32).floor() + 0.5) * 2.0**-32
    upper = (scaled - start[:, None]).ceil()
    lower = torch.cat([upper.new_zeros(upper.shape[0], 1), upper[:, :-1]], dim=1)
    return certain | (upper > lower)


def _stratum_sizes(score: Tensor, countable: Tensor, num_strata: int) -> tuple[Tensor, Tensor]:
    """Stratum of each entry by its rank, and the root mean square score of that stratum.

    Neyman allocation gives stratum h a share proportional to n_h times the spread of the summed quantity. That spread
    is unknown, but the score bounds the size of a token's gradient, so its root mean square bounds the spread.
    """
    n = countable.sum(1, keepdim=True)
    rank = descending_rank(score, countable)
    stratum = torch.where(countable, rank * num_strata // n.clamp(min=1), num_strata)
    positive = score.clamp(min=0.0).masked_fill(~countable, 0.0)
    zeros = score.new_zeros(score.shape[0], num_strata + 1)
    squares = zeros.scatter_add(1, stratum, positive.square())
    counts = zeros.scatter_add(1, stratum, countable.to(score.dtype))
    rms = (squares / counts.clamp(min=1.0)).sqrt()
    return stratum, rms.gather(1, stratum)


def _mix_with_mean(size: Tensor, countable: Tensor, mix: float) -> Tensor:
    """``(1 - mix) * size + mix * mean``: bounds every weight by about n / (mix * k) (Hesterberg 1995)."""
    size = size.clamp(min=0.0).masked_fill(~countable, 0.0)
    mean = size.sum(1, keepdim=True) / countable.sum(1, keepdim=True).clamp(min=1)
    size = (1.0 - mix) * size + (mix + _TINY) * mean
    return torch.where(mean > 0.0, size, 1.0)


def select_reference(
    score: Tensor,
    countable: Tensor,
    ratio: float,
    strategy: str,
    capacity: int,
    num_strata: int,
    min_tokens: int,
    unbiased: bool,
    seed: int,
    draw: int | Tensor,
    defensive_mix: float,
    first_row: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch op ``select``: selects in each row of ``score`` [B, S] separately, without host reads.

    Args:
        score: [B, S] float32, finite.
        countable: [B, S] bool.
        ratio: Keep ratio in (0, 1].
        strategy: One of :data:`cggr_core.settings.SELECTIONS`.
        capacity: Slots K of each row, at most S.
        num_strata: For ``stratified``.
        min_tokens: For ``sequence_aware``: minimum number of kept tokens per row.
        unbiased: Whether strategies with probabilities return weights of 1 / probability.
        seed: Seed of the random strategies.
        draw: Draw of that seed.
        defensive_mix: Share of uniform sampling mixed into ``sampled`` and ``stratified``.
        first_row: Number of the first row among the rows of that draw.

    Returns:
        ``index`` [B, K] int64, ``valid`` [B, K] bool, ``weight`` [B, K] float32, as in
        :class:`cggr_core.selection.Selection`.
    """
    B, S = score.shape
    k = kept_counts(countable, ratio, capacity, max(1, min_tokens) if strategy == "sequence_aware" else 1)
    draws = {"seed": seed, "draw": draw, "device": score.device}
    noise = partial(uniform, (B, S), offset=first_row * _ROW_STRIDE, stride=_ROW_STRIDE, **draws)
    probability: Tensor | None = None
    if strategy in ("topk", "sequence_aware"):
        keep = (descending_rank(score, countable) < k[:, None]) & countable
    elif strategy == "random":
        keep = (descending_rank(noise(), countable) < k[:, None]) & countable
        probability = (k / countable.sum(1).clamp(min=1))[:, None].expand(B, S)
    else:
        size = score.to(torch.float64)
        start = uniform((B,), offset=_ROW_STARTS + first_row, **draws)
        if strategy == "sampled":
            probability = _inclusion_probabilities(_mix_with_mean(size, countable, defensive_mix), countable, k)
            keep = _systematic(probability, k, start)
        else:
            stratum, size = _stratum_sizes(size, countable, num_strata)
            probability = _inclusion_probabilities(_mix_with_mean(size, countable, defensive_mix), countable, k)
            # Walking the strata one after another, each in random order, leaves at most one token per stratum to
            # chance.
            order = (stratum + noise()).argsort(dim=1)
            chosen = _systematic(probability.gather(1, order), k, start)
            keep = torch.zeros_like(chosen).scatter_(1, order, chosen)
    index, valid = compact(keep, capacity)
    if probability is not None and unbiased:
        weight = probability.gather(1, index).clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
    else:
        weight = (countable.sum() / keep.sum().clamp(min=1)).expand_as(index)
    return index, valid, weight.to(torch.float32).masked_fill(~valid, 0.0)


register_reference("select", select_reference)
