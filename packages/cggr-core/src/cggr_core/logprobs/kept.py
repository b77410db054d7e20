"""Turns a keep mask into the slots of a gradient pass, and refuses positions that cannot be kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cggr_core.checks import check_same_device, values_are_free
from cggr_core.selection import Selection, check_mask
from cggr_core.slots import slots_in_steps

if TYPE_CHECKING:
    from cggr_core.routing import TokenInputs

__all__ = ["Kept", "all_tokens", "bad_keep_message", "count_bad", "kept_tokens"]


@dataclass(frozen=True)
class Kept:
    """The kept tokens of a batch, in the rows that run.

    Attributes:
        selection: Selection over the rows that run.
        rows: Which rows those are, int64 ``[R]`` ascending; ``None`` for all.
        shape: ``(B, S)`` of the whole batch.
        row_numbers: The rows as numbers on the host; empty for all.
    """

    selection: Selection
    rows: Tensor | None
    shape: tuple[int, int]
    row_numbers: list[int]

    def spread(self, values: Tensor, elsewhere: Tensor | None = None) -> Tensor:
        """``values`` ``[R, K]`` at the kept positions of ``[B, S]``; ``elsewhere`` ``[B, S]``, or 0, at the others."""
        selection = self.selection
        if elsewhere is None:
            around = values.new_zeros(selection.shape)
            slots = values.masked_fill(~selection.valid, 0.0)
        else:
            around = elsewhere
            slots = torch.where(selection.valid, values, elsewhere.gather(1, selection.index))
        return self.in_whole_batch(around.scatter(1, selection.index, slots))

    def in_whole_batch(self, values: Tensor) -> Tensor:
        """``values`` ``[R, ...]`` of the rows that are run as ``[B, ...]``, 0 in the others."""
        if self.rows is None:
            return values
        return values.new_zeros(self.shape[0], *values.shape[1:]).index_copy(0, self.rows, values)

    def whole_selection(self) -> Selection:
        """The selection over all rows; rows that are not run keep nothing."""
        if self.rows is None:
            return self.selection
        index = torch.arange(self.selection.index.shape[1], device=self.rows.device)
        return replace(
            self.selection,
            index=index.repeat(self.shape[0], 1).index_copy(0, self.rows, self.selection.index),
            valid=self.in_whole_batch(self.selection.valid),
            weight=self.in_whole_batch(self.selection.weight),
            shape=self.shape,
        )


def kept_tokens(keep: Tensor | Selection, batch: TokenInputs, targets: Tensor | None, *, every_row: bool) -> Kept:
    """Build the slots for the kept tokens.

    Args:
        keep: bool ``[B, S]`` in target alignment; or a selection with its own slots and weights.
        batch: The inputs.
        targets: int64 ``[B, S]``, -100 for none; ``None`` if targets are not needed.
        every_row: Run the rows without a kept token too.

    Returns:
        The kept tokens; at least one slot, so that the result is connected to the graph. A mask costs one host read, of
        the number of kept tokens per row.

    Raises:
        TypeError: If ``keep`` is neither bool nor a selection.
        ValueError: If its shape or device is wrong, or it keeps padding or a position without a target.
    """
    if isinstance(keep, Selection):
        if keep.index.shape[0] != batch.shape[0] or tuple(keep.shape) != batch.shape:
            raise ValueError(
                f"keep was selected for {list(keep.shape)} tokens in {keep.index.shape[0]} row(s), but the batch has "
                f"{list(batch.shape)}; select with scope='row', or pass its mask"
            )
        check_same_device("keep.index", keep.index, "the input", batch.position_ids)
        if values_are_free(keep.index):
            _raise_if_bad(count_bad(keep.mask, batch, targets).tolist())
        return Kept(keep, None, batch.shape, [])
    check_mask("keep", keep)
    if tuple(keep.shape) != batch.shape:
        raise ValueError(
            f"keep must have shape {list(batch.shape)}, one entry for each input token, got {list(keep.shape)}; extend "
            "a mask of the completions with keep_tokens(torch.cat([zeros_for_the_prompts, mask], dim=1))"
        )
    check_same_device("keep", keep, "the input", batch.position_ids)
    counts = torch.cat([count_bad(keep, batch, targets), keep.sum(1)]).tolist()
    _raise_if_bad(counts[:2])
    counts = counts[2:]
    rows = [row for row, count in enumerate(counts) if count] or [0]
    chosen, of_rows = None, keep
    if every_row or len(rows) == len(counts):
        rows = []
    else:
        chosen = torch.tensor(rows, device=keep.device)
        of_rows = keep.index_select(0, chosen)
    capacity = slots_in_steps(max(1, *counts), batch.shape[1])
    weight = torch.ones_like(of_rows, dtype=torch.float32)
    return Kept(Selection.from_mask(of_rows, weight=weight, capacity=capacity), chosen, batch.shape, rows)


def all_tokens(batch: TokenInputs) -> Selection:
    """The selection of every position of a batch, padding included: a gradient pass over it is an ordinary forward."""
    everything = torch.ones(batch.shape, dtype=torch.bool, device=batch.position_ids.device)
    return Selection.from_mask(everything, capacity=batch.shape[1])


def count_bad(keep: Tensor, batch: TokenInputs, targets: Tensor | None) -> Tensor:
    """Kept positions that are padding, and others that have no target: int64 ``[2]``."""
    padding = torch.zeros_like(keep) if batch.padding is None else ~batch.padding.bool()
    no_target = torch.zeros_like(keep) if targets is None else (targets == -100) & ~padding
    return torch.stack([(keep & padding).sum(), (keep & no_target).sum()])


def _raise_if_bad(counts: list[int]) -> None:
    if any(counts):
        raise ValueError(bad_keep_message(*counts))


def bad_keep_message(padding: int, no_target: int) -> str:
    """The error message for positions that cannot be kept."""
    found = [f"{padding} position(s) of padding"] if padding else []
    if no_target:
        found.append(f"{no_target} position(s) that predict no token")
    return (
        f"keep marks {' and '.join(found)}. It must be in target alignment: position t is about the token at t + 1, so "
        "the last token of a row or packed document, or before padding, predicts nothing; to convert a mask over the "
        "tokens themselves, use keep_tokens(mask)"
    )
