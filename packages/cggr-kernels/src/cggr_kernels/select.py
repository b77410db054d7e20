"""Selection of tokens: from scores to ascending indices and weights, on the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from cggr_kernels._checks import check_device
from cggr_kernels._library import register
from cggr_kernels._select_parts import kept_counts, seed_step, top_mask
from cggr_kernels.select_details._compact import compact_kernel
from cggr_kernels.select_details._sampled import (
    capped_kernel,
    factor_kernel,
    probability_kernel,
    sampled_walk_kernel,
    size_kernel,
)
from cggr_kernels.select_details._stratified import plan_kernel, stratum_kernel, walk_kernel
from cggr_kernels.select_details._uniform import uniform_kernel

__all__ = ["STRATEGIES", "select"]

STRATEGIES = ("stratified", "sampled", "random", "topk", "sequence_aware")
MAX_STRATA = 64
_BLOCK = 1024


def _uniform(draw: Tensor, seed: int, first_row: Tensor, rows: int, length: int) -> Tensor:
    """Random numbers ``[rows, length]`` for the rows from ``first_row`` on."""
    out = torch.empty(rows, length, dtype=torch.float64, device=draw.device)
    n = out.numel()
    if n:
        grid = (triton.cdiv(n, _BLOCK),)
        uniform_kernel[grid](draw, out, seed_step(seed), first_row, length, n, BLOCK=_BLOCK)
    return out


def _stratified(
    score: Tensor,
    countable: Tensor,
    n: Tensor,
    k: Tensor,
    strata: int,
    seed: int,
    draw: Tensor,
    mix: float,
    first_row: Tensor,
) -> tuple[Tensor, Tensor]:
    """Kept entries and their weights 1 / probability, both ``[B, S]``.

    After one sort by score, strata are ranges of ranks, and a second sort shuffles each of them. What the reference
    does with the entries of a stratum then becomes arithmetic on the stratum's number.
    """
    B, S = score.shape
    device = score.device
    keep_BS = torch.empty(B, S, dtype=torch.int8, device=device)
    weight_BS = torch.empty(B, S, dtype=torch.float32, device=device)
    if not score.numel():
        return keep_BS, weight_BS
    score_BS, position_BS = score.masked_fill(~countable, -torch.inf).sort(dim=1, descending=True, stable=True)
    blocks = triton.cdiv(S, _BLOCK)
    key_BS = torch.empty(B, S, dtype=torch.float64, device=device)
    partial = torch.empty(B, blocks, strata, dtype=torch.float64, device=device)
    step = seed_step(seed)
    stratum_kernel[(blocks, B)](
        score_BS, position_BS, n, draw, key_BS, partial, step, first_row, S, blocks, STRATA=strata, BLOCK=_BLOCK
    )
    probability = torch.empty(B, strata, dtype=torch.float64, device=device)
    plan_kernel[(B,)](partial.sum(1), n, k, probability, MIX=mix, STRATA=strata)
    order_BS = key_BS.argsort(dim=1)
    walk_kernel[(blocks, B)](
        order_BS,
        position_BS,
        n,
        k,
        probability,
        draw,
        keep_BS,
        weight_BS,
        step,
        first_row,
        S,
        STRATA=strata,
        BLOCK=_BLOCK,
    )
    return keep_BS, weight_BS


def _sampled(
    score: Tensor, countable: Tensor, n: Tensor, k: Tensor, seed: int, draw: Tensor, mix: float, first_row: Tensor
) -> tuple[Tensor, Tensor]:
    """Kept entries and their weights 1 / probability, both ``[B, S]``.

    Sorting in float32 halves the cost; the uniform part mixed in later preserves the order. The order is ascending, so
    that capping needs only cumulative sums.
    """
    B, S = score.shape
    device = score.device
    keep_BS = torch.empty(B, S, dtype=torch.int8, device=device)
    weight_BS = torch.empty(B, S, dtype=torch.float32, device=device)
    if not score.numel():
        return keep_BS, weight_BS
    blocks = triton.cdiv(S, _BLOCK)
    grid = (blocks, B)
    # Rounded as in torch, so that ties in the reference are ties here.
    constants = {"MIX": mix, "BLOCK": _BLOCK, "enable_fp_fusion": False}
    score = score.clamp(min=0.0).masked_fill(~countable, -1.0)
    mean_B = score.clamp(min=0.0).sum(1, dtype=torch.float64) / n.clamp(min=1)
    size_BS = torch.empty(B, S, dtype=torch.float64, device=device)
    size_kernel[grid](score.sort(dim=1).values, mean_B, size_BS, S, **constants)
    tail_BS = size_BS.cumsum(1)
    partial = torch.empty(B, blocks, dtype=torch.int32, device=device)
    capped_kernel[grid](size_BS, tail_BS, k, partial, S, blocks, BLOCK=_BLOCK, enable_fp_fusion=False)
    factor_B2 = torch.empty(B, 2, dtype=torch.float64, device=device)
    factor_kernel[(B,)](size_BS, tail_BS, partial.sum(1), k, factor_B2, S)
    probability_kernel[grid](score, mean_B, factor_B2, size_BS, partial, S, blocks, **constants)
    walk_BS, certain_B = size_BS.cumsum(1), partial.sum(1)
    sampled_walk_kernel[grid](
        score,
        mean_B,
        factor_B2,
        walk_BS,
        certain_B,
        k,
        draw,
        keep_BS,
        weight_BS,
        seed_step(seed),
        first_row,
        S,
        **constants,
    )
    return keep_BS, weight_BS


def _compact(keep: Tensor, weight: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots ``[B, capacity]`` of the kept entries; unused slots have weight 0."""
    B, S = keep.shape
    index = torch.empty(B, capacity, dtype=torch.int64, device=keep.device)
    valid = torch.empty(B, capacity, dtype=torch.bool, device=keep.device)
    slot_weight = torch.empty(B, capacity, dtype=torch.float32, device=keep.device)
    if index.numel():
        count_BS = keep.cumsum(1)
        compact_kernel[(triton.cdiv(S, _BLOCK), B)](
            keep, count_BS, weight, index, valid, slot_weight, *weight.stride(), S, capacity, BLOCK=_BLOCK
        )
    return index, valid, slot_weight


def _launch(
    score: Tensor,
    countable: Tensor,
    ratio: float,
    strategy: str,
    capacity: int,
    num_strata: int,
    min_tokens: int,
    unbiased: bool,
    seed: int,
    draw: Tensor,
    defensive_mix: float,
    first_row: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    B, S = score.shape
    n, k = kept_counts(countable, ratio, capacity, min_tokens if strategy == "sequence_aware" else 1)
    weight_BS = None
    if strategy == "stratified":
        keep_BS, weight_BS = _stratified(score, countable, n, k, num_strata, seed, draw, defensive_mix, first_row)
    elif strategy == "sampled":
        keep_BS, weight_BS = _sampled(score, countable, n, k, seed, draw, defensive_mix, first_row)
    elif strategy == "random":
        noise = _uniform(draw, seed, first_row, B, S)
        keep_BS = top_mask(noise, countable, k)
        weight_BS = (n / k.clamp(min=1)).to(torch.float32)[:, None].expand(B, S)
    else:
        keep_BS = top_mask(score, countable, k)
    if weight_BS is None or not unbiased:
        # Every kept token stands for the same number of countable tokens of the whole batch.
        weight_BS = (n.sum() / k.sum().clamp(min=1)).to(torch.float32).expand(B, S)
    return _compact(keep_BS, weight_BS, capacity)


def _fake(
    score: Tensor,
    countable: Tensor,
    ratio: float,
    strategy: str,
    capacity: int,
    num_strata: int,
    min_tokens: int,
    unbiased: bool,
    seed: int,
    draw: Tensor,
    defensive_mix: float,
    first_row: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    index = score.new_empty(score.shape[0], capacity, dtype=torch.int64)
    return index, torch.empty_like(index, dtype=torch.bool), torch.empty_like(index, dtype=torch.float32)


_select = register(
    "select(Tensor score, Tensor countable, float ratio, str strategy, int capacity, int num_strata, int min_tokens,"
    " bool unbiased, int seed, Tensor draw, float defensive_mix, Tensor first_row) -> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)


@torch.no_grad()
def select(
    score: Tensor,
    countable: Tensor,
    ratio: float,
    strategy: str = "stratified",
    capacity: int | None = None,
    num_strata: int = 4,
    min_tokens: int = 1,
    unbiased: bool = True,
    seed: int = 0,
    draw: int | Tensor = 0,
    defensive_mix: float = 0.05,
    first_row: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose ``round(ratio * n)`` of the ``n`` countable tokens of each row, at least one if there are any.

    The host reads nothing; the same seed and draw choose the same tokens. ``stratified``: Neyman's allocation over
    ``num_strata`` equal buckets by score, with the root mean square score as the spread, then systematic sampling
    (Madow 1949) over the buckets, each in random order; ``sampled``: probability proportional to the score, capped at
    1; ``random``; ``topk``: the highest scores, lower positions first among ties; ``sequence_aware``: the same, with at
    least ``min_tokens`` per row.

    Args:
        score: Shape ``[B, S]``, float32, finite; higher is more worth learning from.
        countable: Shape ``[B, S]``, bool; no other token is kept.
        ratio: Keep ratio in (0, 1].
        strategy: One of :data:`STRATEGIES`.
        capacity: Slots K of each row, at most S; ``None`` for all.
        num_strata: Buckets of ``stratified``, at most 64.
        min_tokens: For ``sequence_aware``.
        unbiased: Whether ``stratified``, ``sampled`` and ``random`` weight by 1 / probability (Horvitz and Thompson
            1952); otherwise every kept token has the weight countable / kept of the whole batch.
        seed: Seed of the random strategies; the low 64 bits are used.
        draw: Number of the draw for that seed: an int, or a 0-dim int64 tensor on the device, which the host never
            reads.
        defensive_mix: Share of uniform sampling in ``stratified`` and ``sampled``, in [0, 1]; it bounds the weights.
        first_row: Number of the first row among the rows of that draw, of the same types. Batches that share a draw and
            number their rows consecutively choose what one batch of all the rows would.

    Returns:
        ``index`` ``[B, K]`` int64: K distinct positions of each row, ascending; unused slots are filled with positions
        that are not kept; ``valid`` ``[B, K]`` bool; ``weight`` ``[B, K]`` float32, 0 where not valid.

    Raises:
        TypeError: If a dtype is not accepted.
        ValueError: If shapes or devices do not match, a number is out of range, or the strategy is unknown.

    Example:
        >>> score = torch.tensor([[0.1, 3.0, 0.2, 2.0]], device="cuda")
        >>> select(score, score > 0, 0.5, "topk", 2)[0]
        tensor([[1, 3]], device='cuda:0')
    """
    if score.dtype != torch.float32 or countable.dtype != torch.bool:
        raise TypeError(f"score must be float32 and countable bool, got {score.dtype} and {countable.dtype}")
    if score.dim() != 2 or countable.shape != score.shape:
        shapes = f"{tuple(score.shape)} and {tuple(countable.shape)}"
        raise ValueError(f"score and countable must both be [B, S], got {shapes}")
    check_device(score=score, countable=countable)
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    if not 0 <= defensive_mix <= 1:
        raise ValueError(f"defensive_mix must be in [0, 1], got {defensive_mix}")
    if not 1 <= num_strata <= MAX_STRATA:
        raise ValueError(f"num_strata must be in [1, {MAX_STRATA}], got {num_strata}")
    S = score.shape[1]
    capacity = S if capacity is None else capacity
    if not 0 <= capacity <= S:
        raise ValueError(f"capacity must be in [0, {S}] for score {tuple(score.shape)}, got {capacity}")
    # The op takes signed 64-bit seeds.
    seed = (seed & (1 << 64) - 1) - (1 << 64 if seed >> 63 & 1 else 0)
    return _select(
        score.contiguous(),
        countable.contiguous(),
        ratio,
        strategy,
        capacity,
        num_strata,
        min_tokens,
        unbiased,
        seed,
        _number("draw", draw, score),
        defensive_mix,
        _number("first_row", first_row, score),
    )


def _number(name: str, value: int | Tensor, score: Tensor) -> Tensor:
    """A number as a 0-dim int64 tensor beside ``score``."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=torch.int64, device=score.device)
    if value.dtype != torch.int64 or value.dim() != 0:
        raise TypeError(f"{name} must be an int or a 0-dim int64 tensor, got {value.dtype} {tuple(value.shape)}")
    check_device(score=score, **{name: value})
    return value
