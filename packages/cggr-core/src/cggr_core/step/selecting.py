"""The kept tokens of a step, or its kept rows, from the scores."""

from __future__ import annotations

import dataclasses
import functools
import logging

import torch
from torch import Tensor

from cggr_core.schedule import Schedule
from cggr_core.selection import Selection, with_margin
from cggr_core.settings import SUPERVISED, RoutingSettings
from cggr_core.slots import slots_in_steps
from cggr_core.step.batch import StepBatch
from cggr_core.step.draws import Draws
from cggr_core.strategies import plain_weight, select

_logger = logging.getLogger(__name__)


@functools.cache
def _warn_of_single_row() -> None:
    _logger.warning(
        "gradient='sequence' chooses among the rows of a batch, but this one has a single row, so all of it is kept "
        "and the step equals the standard one. Packed documents in one row are not separate sequences: put them in "
        "separate rows, or use gradient='kv'"
    )


def supervised_slots(labels: Tensor, ignore_index: int, *, margin: int = 0) -> int:
    """Slots that hold the labelled tokens of every row, rounded up so that shapes repeat.

    Labels on a device are read here, the only time that a step waits for the device. Counting them later would wait for
    the first pass as well.

    Args:
        labels: int64 ``[B, S]``. How the model aligns them does not matter: a row has no more targets than labels.
        ignore_index: Label of what is not countable.
        margin: Tokens before each stretch of them that are kept too.
    """
    largest = int(with_margin(labels != ignore_index, margin).sum(1).max()) if labels.numel() else 0
    return slots_in_steps(largest, labels.shape[1])


def select_tokens(
    settings: RoutingSettings, batch: StepBatch, score: Tensor | None, schedule: Schedule, draws: Draws
) -> tuple[Selection, Tensor]:
    """The kept tokens, and 1 / their inclusion probability ``[B, K]``.

    Args:
        settings: Of the step.
        batch: The batch; a selection passed by the caller is returned.
        score: ``[B, S]``, or ``None`` if the selection does not use scores.
        schedule: The ratio, and with it the slots.
        draws: Numbers the random choice.
    """
    countable, length = batch.countable, batch.shape[1]
    if batch.selection is not None:
        return batch.selection, batch.selection.weight
    if settings.selection == SUPERVISED:
        padding = batch.tokens.padding
        selection = Selection.from_mask(
            countable,
            countable=countable,
            capacity=batch.slots,
            margin=settings.context_margin,
            within=None if padding is None else padding.bool(),
        )
        return selection, selection.weight
    if score is None:
        score = torch.zeros(countable.shape, device=countable.device)
    capacity = schedule.capacity(length)
    if settings.selection == "sequence_aware":
        capacity = min(max(capacity, settings.min_tokens_per_sequence), length)
    return _select(settings, batch, score, countable, schedule, draws, capacity, settings.block_size)


def select_rows(
    settings: RoutingSettings, batch: StepBatch, score: Tensor | None, schedule: Schedule, draws: Draws
) -> tuple[Selection, Tensor]:
    """The kept rows of the batch, as one row of ``B`` tokens, and 1 / their inclusion probability ``[1, K]``."""
    if batch.shape[0] == 1 and schedule.ratio < 1.0:
        _warn_of_single_row()
    counts = batch.countable.sum(1)
    row_score = counts.float() if score is None else (score * batch.countable).sum(1) / counts.clamp(min=1)
    return _select(settings, batch, row_score[None], (counts > 0)[None], schedule, draws, None, 1)


def _select(
    settings: RoutingSettings,
    batch: StepBatch,
    score: Tensor,
    countable: Tensor,
    schedule: Schedule,
    draws: Draws,
    capacity: int | None,
    block_size: int,
) -> tuple[Selection, Tensor]:
    # An observing router receives the probabilities even when the loss is the plain mean over the kept tokens.
    selection = select(
        score,
        countable,
        ratio=schedule.ratio,
        selection=settings.selection,
        scope="row",
        capacity=capacity,
        num_strata=settings.num_strata,
        min_tokens_per_sequence=settings.min_tokens_per_sequence,
        block_size=block_size,
        unbiased=True,
        seed=settings.seed,
        draw=draws.next(countable.device) if batch.draw is None else batch.draw,
        first_row=batch.first_row,
    )
    weight = selection.weight
    if not settings.unbiased:
        selection = dataclasses.replace(selection, weight=plain_weight(countable, selection.valid))
    return selection, weight
