"""Selection in plain torch: the reference of the op ``select``, and the parts of it that the op itself uses."""

from __future__ import annotations

import torch
from torch import Tensor

PROBABILITY_STRATEGIES = frozenset({"stratified", "sampled", "random"})
# Taken for 1, so that no step of the systematic walk is as long as 1.
_CERTAIN = 1.0 - 1e-9
_TINY = 1e-12
# Positions from one row's random numbers to the next row's, and to the numbers of which each row has one.
ROW_STRIDE = 1 << 32
ROW_STARTS = 1 << 62


def signed(value: int) -> int:
    """The low 64 bits of ``value`` as a signed number."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


def seed_step(seed: int) -> int:
    """What a seed adds to the counter before it is hashed."""
    return signed(seed * 0xD1342543DE82EF95)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def uniform_reference(draw: Tensor, seed: int, position: Tensor) -> Tensor:
    """Numbers in (0, 1), float64, of the int64 positions (SplitMix64)."""
    golden = signed(0x9E3779B97F4A7C15)
    key = _mix(_mix(draw * golden + seed_step(seed)) + golden)
    return (_shift_right(_mix(position * golden + key), 12).to(torch.float64) + 0.5) * 2.0**-52


def kept_counts(countable: Tensor, ratio: float, capacity: int, at_least: int) -> tuple[Tensor, Tensor]:
    """Countable tokens and tokens to keep of each row, both int64 ``[B]``."""
    n_B = countable.sum(1)
    k_B = (n_B.to(torch.float64) * ratio).round().to(torch.int64).clamp(min=at_least)
    return n_B, torch.minimum(k_B, n_B).clamp(max=capacity)


def top_mask(key: Tensor, countable: Tensor, k: Tensor) -> Tensor:
    """The ``k`` countable entries of each row with the highest keys; ties go to the lower position."""
    order_BS = key.masked_fill(~countable, -torch.inf).argsort(dim=1, descending=True, stable=True)
    first_BS = (torch.arange(key.shape[1], device=key.device) < k[:, None]).expand_as(order_BS)
    return torch.zeros_like(countable).scatter_(1, order_BS, first_BS) & countable


def compact(keep: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Kept positions, ascending, filled up to ``capacity`` with ones that are not kept; and which are kept."""
    B, S = keep.shape
    other = ~keep
    member = keep | (other.cumsum(1) <= capacity - keep.sum(1, keepdim=True))
    slot = torch.where(member, member.cumsum(1) - 1, capacity)
    positions = torch.arange(S, device=keep.device).expand(B, S)
    index = torch.zeros(B, capacity + 1, dtype=torch.int64, device=keep.device)
    index = index.scatter_(1, slot, positions)[:, :capacity].contiguous()
    return index, keep.gather(1, index)


def defend(size: Tensor, mean: Tensor, mix: float) -> Tensor:
    """``(1 - mix) * size + mix * mean``, which bounds every weight (Hesterberg 1995)."""
    return torch.where(mean > 0.0, (1.0 - mix) * size + (mix + _TINY) * mean, 1.0)


def mean_size(size: Tensor, countable: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes without negative ones, 0 where not countable, and their mean over countable ones ``[B, 1]``."""
    size = size.clamp(min=0.0).masked_fill(~countable, 0.0)
    return size, size.sum(1, keepdim=True) / countable.sum(1, keepdim=True).clamp(min=1)


def inclusion_probabilities(size: Tensor, descending: Tensor, countable: Tensor, k: Tensor) -> Tensor:
    """``min(1, c * size)`` that sum to ``k`` in each row; the smallest j with (k - j) size_j <= T_j are capped.

    ``descending`` holds the sizes sorted, 0 for those not countable.
    """
    tail = descending.flip(1).cumsum(1).flip(1)
    j = torch.arange(size.shape[1], device=size.device)
    capped = ((k[:, None] - j) * descending > tail).sum(1, keepdim=True)
    tail = torch.cat([tail, tail.new_zeros(tail.shape[0], 1)], dim=1).gather(1, capped)
    c = (k[:, None] - capped) / tail.clamp(min=torch.finfo(tail.dtype).tiny)
    threshold = torch.cat([descending, descending.new_zeros(descending.shape[0], 1)], dim=1)
    smallest_capped = threshold.gather(1, (capped - 1).clamp(min=0)).masked_fill(capped == 0, torch.inf)
    pi = torch.where(size >= smallest_capped, 1.0, (c * size).clamp(max=1.0))
    return pi.masked_fill(~countable, 0.0)


def _probabilities(size: Tensor, countable: Tensor, k: Tensor, mix: float) -> Tensor:
    size, mean = mean_size(size, countable)
    size = defend(size, mean, mix)
    descending = size.masked_fill(~countable, 0.0).sort(dim=1, descending=True).values
    return inclusion_probabilities(size, descending, countable, k)


def systematic(pi: Tensor, k: Tensor, start: Tensor) -> Tensor:
    """Systematic sampling (Madow 1949) in the order given: exactly ``k`` of each row, entry i with probability pi_i."""
    certain = pi >= _CERTAIN
    left = (k - certain.sum(1))[:, None].to(pi.dtype)
    cumulated = pi.masked_fill(certain, 0.0).cumsum(1)
    total = cumulated[:, -1:]
    scaled = torch.minimum(cumulated * (left / total.clamp(min=torch.finfo(pi.dtype).tiny)), left)
    scaled = torch.where(cumulated >= total, left, scaled)
    start = ((start * 2.0**32).floor() + 0.5) * 2.0**-32
    upper = (scaled - start[:, None]).ceil()
    lower = torch.cat([upper.new_zeros(upper.shape[0], 1), upper[:, :-1]], dim=1)
    return certain | (upper > lower)


def _stratified(
    score: Tensor, countable: Tensor, k: Tensor, strata: int, mix: float, noise: Tensor, start: Tensor
) -> tuple[Tensor, Tensor]:
    """Kept entries, and the probability of every entry."""
    B, S = score.shape
    n = countable.sum(1, keepdim=True)
    order = score.masked_fill(~countable, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(S, device=score.device).expand(B, S)
    rank = torch.empty_like(order).scatter_(1, order, ranks)
    stratum = torch.where(countable, rank * strata // n.clamp(min=1), strata)
    positive = score.clamp(min=0.0).masked_fill(~countable, 0.0)
    zeros = score.new_zeros(B, strata + 1)
    squares = zeros.scatter_add(1, stratum, positive.square())
    counts = zeros.scatter_add(1, stratum, countable.to(score.dtype))
    size = (squares / counts.clamp(min=1.0)).sqrt().gather(1, stratum)
    pi = _probabilities(size, countable, k, mix)
    walk = (stratum + noise).argsort(dim=1)
    chosen = systematic(pi.gather(1, walk), k, start)
    return torch.zeros_like(chosen).scatter_(1, walk, chosen), pi


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
    first_row: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch twin of :func:`cggr_kernels.select.select`, arguments as there, unchecked.

    Returns:
        ``index`` ``[B, K]`` int64, ``valid`` ``[B, K]`` bool, ``weight`` ``[B, K]`` float32.
    """
    B, S = score.shape
    draw = draw if isinstance(draw, Tensor) else torch.full((), draw, device=score.device)
    n, k = kept_counts(countable, ratio, capacity, min_tokens if strategy == "sequence_aware" else 1)
    row = torch.arange(first_row, first_row + B, device=score.device)
    noise = uniform_reference(draw, seed, row[:, None] * ROW_STRIDE + torch.arange(S, device=score.device))
    start = uniform_reference(draw, seed, ROW_STARTS + row)
    size = score.to(torch.float64)
    probability = None
    if strategy in ("topk", "sequence_aware"):
        keep = top_mask(score, countable, k)
    elif strategy == "random":
        keep = top_mask(noise, countable, k)
        probability = (k / n.clamp(min=1))[:, None].expand(B, S)
    elif strategy == "sampled":
        probability = _probabilities(size, countable, k, defensive_mix)
        keep = systematic(probability, k, start)
    else:
        keep, probability = _stratified(size, countable, k, num_strata, defensive_mix, noise, start)
    index, valid = compact(keep, capacity)
    return index, valid, slot_weights(keep, valid, index, countable, probability if unbiased else None)


def slot_weights(keep: Tensor, valid: Tensor, index: Tensor, countable: Tensor, probability: Tensor | None) -> Tensor:
    """1 / probability at the kept slots, or countable over kept of all rows; float32 ``[B, K]``."""
    if probability is None:
        weight = (countable.sum() / keep.sum().clamp(min=1)).expand_as(index)
    else:
        weight = probability.gather(1, index).clamp(min=torch.finfo(torch.float32).tiny).reciprocal()
    return weight.to(torch.float32).masked_fill(~valid, 0.0)
