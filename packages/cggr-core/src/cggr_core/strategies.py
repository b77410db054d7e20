"""The strategies that make a selection from scores."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_core.backends import resolve
from cggr_core.checks import (
    check_at_least,
    check_choice,
    check_finite_number,
    check_float,
    check_integer,
    check_number,
    check_ratio,
    values_are_free,
)
from cggr_core.sampling import compact, descending_rank, kept_counts
from cggr_core.selection import Selection, check_mask
from cggr_core.settings import SCOPES, SELECTIONS, WITH_PROBABILITIES, SelectionSettings
from cggr_core.slots import slots_for

__all__ = ["plain_weight", "select"]


def select(
    score: Tensor,
    countable: Tensor,
    *,
    ratio: float,
    selection: str = SelectionSettings.selection,
    scope: str = "row",
    capacity: int | None = None,
    num_strata: int = SelectionSettings.num_strata,
    min_tokens_per_sequence: int = SelectionSettings.min_tokens_per_sequence,
    block_size: int = SelectionSettings.block_size,
    unbiased: bool = SelectionSettings.unbiased,
    seed: int = SelectionSettings.seed,
    draw: int | Tensor = 0,
    defensive_mix: float = 0.05,
    first_row: int | Tensor = 0,
) -> Selection:
    """Choose the tokens to keep.

    A row (scope "row"), or the whole batch (scope "batch"), keeps ``round(ratio * n)`` of its n countable tokens, and
    at least one if there is any, in K slots that depend on Python numbers only: the host reads nothing, and shapes
    repeat.

    ============== ================================================================================================
    selection      which tokens
    ============== ================================================================================================
    stratified     ``num_strata`` equal buckets by score; Neyman allocation (share of a bucket ∝ its size times the
                   root mean square of its scores, no probability above 1); drawn at random within. The default.
    sampled        probability ∝ score, capped at 1; systematic sampling, so that the count is exact
    random         uniformly: the control that a score has to beat
    topk           the highest scores. It trains on a biased sample of the data: keeping the hardest quarter by loss
                   gave a far worse held-out loss than keeping a random quarter. Use it for research.
    sequence_aware topk over the scope with at least ``min_tokens_per_sequence`` of every row; as biased as topk
    ============== ================================================================================================

    The first three weight every kept token by the inverse of its inclusion probability (Horvitz & Thompson 1952), so
    that ``sum(weight * nll) / n`` is an unbiased estimate of the mean nll over all n countable tokens, and so is its
    gradient.

    Args:
        score: [B, S] floating, higher = more worth learning from. For probabilities, negative scores count as 0.
        countable: [B, S] bool: the tokens that have a target. No other token is ever kept.
        ratio: Keep ratio in (0, 1].
        selection: One of :data:`~cggr_core.settings.SELECTIONS`.
        scope: "row" keeps the ratio in each row; "batch" over the flattened batch.
        capacity: Slots K of each row, or of the batch. None for ``ratio`` of the length, rounded up. A smaller capacity
            limits what is kept.
        num_strata: Buckets of ``stratified``.
        min_tokens_per_sequence: For ``sequence_aware``: minimum number of kept tokens per row (K grows with it, unless
            given).
        block_size: Choose blocks of this many neighbouring positions instead of tokens, by their mean score; counts
            and the ratio are then in blocks, and K is rounded up to whole blocks.
        unbiased: Weight by the inverse probability. False gives the plain mean over the kept tokens of a row, as
            ``topk`` does.
        seed: Seed of the random strategies.
        draw: Draw of that seed: an int, or a 0-dim int64 tensor on the device. The same seed and draw choose the same
            tokens on every device and rank.
        defensive_mix: Share of uniform sampling mixed into ``sampled`` and ``stratified``, in [0, 1]. It bounds the
            weights by about 1 / (defensive_mix * ratio) (Hesterberg 1995).
        first_row: Number of the first row among the rows of that draw, an int or a 0-dim int64 tensor on the device.
            What a row keeps depends only on the seed, the draw, its number and its scores, so micro-batches and ranks
            that share a draw and number their rows consecutively choose the same tokens as one batch of all rows.

    Returns:
        :class:`Selection`.

    Raises:
        TypeError: If a dtype or the type of an argument is wrong.
        ValueError: If a name, shape, device or number is not accepted, or (on CPU) a countable score is NaN.

    Example:
        >>> score = torch.tensor([[0.1, 3.0, 0.2, 2.0]])
        >>> select(score, torch.ones(1, 4, dtype=torch.bool), ratio=0.5, selection="topk").index
        tensor([[1, 3]])
    """
    ratio = check_ratio("ratio", ratio)
    check_choice("selection", selection, SELECTIONS)
    check_choice("scope", scope, SCOPES)
    _check_numbers(num_strata, min_tokens_per_sequence, block_size, first_row, capacity, seed, draw, defensive_mix)
    check_float("score", score)
    if score.dim() != 2:
        raise ValueError(f"score must be [B, S], got shape {tuple(score.shape)}")
    check_mask("countable", countable, score, "score")

    B0, S0 = score.shape
    token_score, token_countable = _finite(score, countable), countable
    if block_size > 1:
        token_score, token_countable = _blocks(token_score, countable, block_size)
    min_units = -(-min_tokens_per_sequence // block_size)
    rows, length = token_score.shape
    if scope == "batch":
        rows, length = 1, rows * length
    units = _capacity(ratio, length, capacity, block_size)
    if capacity is None and selection == "sequence_aware":
        wanted = min_units if scope == "row" else B0 * min_units
        units = min(length, max(units, wanted))

    if scope == "batch" and selection == "sequence_aware":
        index, valid = _sequence_aware_batch(token_score, token_countable, ratio, units, min_units)
        weight = valid.to(torch.float32)
    else:
        op = resolve("select", score.device.type)
        index, valid, weight = op(
            token_score.reshape(rows, length),
            token_countable.reshape(rows, length),
            ratio,
            selection,
            units,
            num_strata,
            min_units,
            unbiased,
            seed,
            draw,
            defensive_mix,
            first_row,
        )
    if block_size > 1:
        index, valid, weight = _expand_blocks(index, valid, weight, countable, rows, block_size)
    n, kept = countable.sum(), valid.sum()
    if not (unbiased and selection in WITH_PROBABILITIES):
        weight = plain_weight(countable.reshape(rows, B0 * S0 // max(1, rows)), valid)
    return Selection(index, valid, weight, (kept / n.clamp(min=1)).to(torch.float32), (B0, S0))


def plain_weight(countable: Tensor, valid: Tensor) -> Tensor:
    """Weights that make the weighted loss the plain mean over the kept tokens of each row.

    Per row, so that a batch split into micro-batches or over ranks gets the same weights as the whole.

    Args:
        countable: [B, S] bool.
        valid: [B, K] bool: slots that hold kept tokens.

    Returns:
        float32 [B, K], 0 where not valid.

    Example:
        >>> plain_weight(torch.ones(1, 6, dtype=torch.bool), torch.tensor([[True, True, False]]))
        tensor([[3., 3., 0.]])
    """
    counts = countable.sum(1, keepdim=True) / valid.sum(1, keepdim=True).clamp(min=1)
    return counts.to(torch.float32) * valid


def _check_numbers(
    num_strata: int,
    min_tokens_per_sequence: int,
    block_size: int,
    first_row: int | Tensor,
    capacity: int | None,
    seed: int,
    draw: int | Tensor,
    defensive_mix: float,
) -> None:
    check_at_least("num_strata", num_strata, 1)
    check_at_least("min_tokens_per_sequence", min_tokens_per_sequence, 0)
    check_at_least("block_size", block_size, 1)
    check_number("first_row", first_row, 0)
    if capacity is not None:
        check_at_least("capacity", capacity, 1)
    check_integer("seed", seed)
    check_number("draw", draw)
    if check_finite_number("defensive_mix", defensive_mix, minimum=0.0) > 1.0:
        raise ValueError(f"defensive_mix must be in [0, 1], got {defensive_mix!r}")


def _capacity(ratio: float, length: int, capacity: int | None, block_size: int) -> int:
    """Slots in units of the selection (tokens or blocks)."""
    if capacity is None:
        return slots_for(ratio, length)
    return min(length, -(-capacity // block_size))


def _finite(score: Tensor, countable: Tensor) -> Tensor:
    """``score`` in float32 without infinities; NaN is an error on CPU and counts as the lowest score elsewhere."""
    if values_are_free(score):
        bad = int((score.isnan() & countable).sum())
        if bad:
            raise ValueError(f"score is NaN at {bad} of {int(countable.sum())} countable tokens")
    lowest = torch.finfo(torch.float32).min
    return torch.nan_to_num(score.detach().to(torch.float32), nan=lowest)


def _blocks(score: Tensor, countable: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean score over the countable tokens of each block of ``size`` positions, and whether it has any: [B, NB]."""
    B, S = score.shape
    blocks, padding = -(-S // size), -S % size
    score = torch.nn.functional.pad(score.masked_fill(~countable, 0.0), (0, padding)).reshape(B, blocks, size)
    count = torch.nn.functional.pad(countable, (0, padding)).reshape(B, blocks, size).sum(2)
    # Divided before the sum: large scores must not overflow.
    return (score / count.clamp(min=1)[:, :, None]).sum(2), count > 0


def _sequence_aware_batch(
    score: Tensor, countable: Tensor, ratio: float, capacity: int, min_tokens: int
) -> tuple[Tensor, Tensor]:
    """Top-k over the whole batch in which each row keeps at least ``min_tokens``: ``index``, ``valid`` [1, K]."""
    guaranteed = ((descending_rank(score, countable) < min_tokens) & countable).reshape(1, -1)
    countable = countable.reshape(1, -1)
    rank = descending_rank(score.reshape(1, -1), countable)
    rank = torch.where(guaranteed, rank - score.numel(), rank)
    k = torch.maximum(kept_counts(countable, ratio, capacity), guaranteed.sum(1)).clamp(max=capacity)
    keep = (descending_rank(-rank.to(torch.float64), countable) < k[:, None]) & countable
    return compact(keep, capacity)


def _expand_blocks(
    index: Tensor, valid: Tensor, weight: Tensor, countable: Tensor, rows: int, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Expand kept blocks to kept tokens: every countable token of a kept block, with the weight of its block."""
    B0, S0 = countable.shape
    blocks = -(-S0 // block_size)
    dense = torch.zeros(rows, B0 * blocks // max(1, rows), dtype=torch.float32, device=index.device)
    kept = dense.to(torch.bool).scatter(1, index, valid).reshape(B0, blocks)
    dense = dense.scatter(1, index, weight).reshape(B0, blocks)
    keep = kept.repeat_interleave(block_size, dim=1)[:, :S0] & countable
    token_weight = dense.repeat_interleave(block_size, dim=1)[:, :S0]
    length = B0 * S0 // max(1, rows)
    new_index, new_valid = compact(keep.reshape(rows, length), min(length, index.shape[1] * block_size))
    new_weight = token_weight.reshape(rows, length).gather(1, new_index).masked_fill(~new_valid, 0.0)
    return new_index, new_valid, new_weight
