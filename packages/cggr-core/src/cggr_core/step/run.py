"""One training step, top to bottom: all tokens, scores, selection, kept tokens, weighted loss.

Labels arrive as targets, moved to the positions that predict them (:mod:`cggr_core.targets`). Scores and loss use
targets; a position without one is not countable: never scored, kept or counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_core.coefficients import loss_coefficients
from cggr_core.readout import HeadReadout
from cggr_core.schedule import Schedule
from cggr_core.scoring import fields_for
from cggr_core.settings import KEY_VALUE_MODES, SUPERVISED, RoutingSettings
from cggr_core.step.batch import StepBatch
from cggr_core.step.draws import Draws
from cggr_core.step.first_pass import FirstPass, first_pass
from cggr_core.step.metrics import step_metrics
from cggr_core.step.router import Observation, Router, ScoreRequest, Scores
from cggr_core.step.selecting import select_rows, select_tokens
from cggr_core.targets import Targets

if TYPE_CHECKING:
    from cggr_core.routing import Engine


@dataclass(frozen=True)
class StepResult:
    """The loss and other results of a step; ``observation`` is ``None`` if no router observes."""

    loss: Tensor
    metrics: dict[str, Any]
    targets: Targets
    scores: Scores
    observation: Observation | None


@dataclass(frozen=True)
class Kept:
    """Slots ``[R, K]`` of kept tokens: inputs of the loss, and their positions in the batch."""

    values: Tensor  # head values [R, K, ...]
    targets: Tensor
    coefficients: Tensor  # factor of each slot's nll in the loss
    inclusion_weight: Tensor  # 1 / inclusion probability
    row: Tensor  # [R]
    position: Tensor
    mask: Tensor  # [B, S]
    auxiliary_loss: Tensor | None


def run_step(
    settings: RoutingSettings, batch: StepBatch, passes: Engine, router: Router, schedule: Schedule, draws: Draws
) -> StepResult:
    """Turn a batch into a loss whose backward pass is spent on the kept tokens; see :class:`cggr_core.CGGRModel`."""
    preselected = batch.selection is not None
    reads_scores = settings.reads_scores and not preselected
    # If every token is kept, no score is needed, except for the confidence that changes the ratio.
    scored = reads_scores and (schedule.ratio < 1.0 or schedule.reads_confidence)
    # If every token is kept, including those without a label, the step is ordinary training in every mode.
    keeps_all = schedule.ratio == 1.0 and not preselected and settings.selection != SUPERVISED
    mode, engine = "exact" if keeps_all else settings.gradient, "plain"
    if mode in KEY_VALUE_MODES:
        at_full_depth = scored and router.depth == passes.depth
        engine = settings.engine or ("two_pass" if at_full_depth else "interleaved")

    first = first_pass(settings, mode, engine, batch, passes, router if reads_scores else None, scored=scored)

    readout, scores = HeadReadout(passes.architecture.head, ignore_index=settings.ignore_index), Scores()
    if scored:
        fields = fields_for(settings.scoring) | ({"confidence"} if schedule.reads_confidence else frozenset())
        request = ScoreRequest(settings, batch, passes, readout, fields, first.depth, first.values, first.hidden)
        with torch.no_grad():
            scores = router.score(request)

    if mode == "sequence":
        kept = _keep_rows(settings, batch, passes, scores, schedule, draws)
    else:
        kept = _keep_tokens(settings, mode, batch, passes, first, scores, schedule, draws)

    loss, auxiliary_loss = readout.weighted_loss(kept.values, kept.targets, kept.coefficients), kept.auxiliary_loss
    if auxiliary_loss is not None:
        if batch.num_items is not None:
            # A mean over this batch's tokens, so it is scaled by the batch's share of all tokens in the loss.
            auxiliary_loss = auxiliary_loss * (batch.countable.sum() / batch.divisor)
        loss = loss + auxiliary_loss

    metrics: dict[str, Any] = {"gradient": settings.gradient, "engine": engine}
    metrics |= step_metrics(
        loss, countable=batch.countable, kept=kept.mask & batch.countable, scores=scores, auxiliary_loss=auxiliary_loss
    )
    observation = None
    if reads_scores and torch.is_grad_enabled():
        slots = (kept.values, kept.targets, kept.inclusion_weight, kept.row, kept.position)
        observation = Observation(settings, batch, passes, readout, *slots, first.hidden)
    return StepResult(loss, metrics, batch.targets, scores, observation)


def _keep_tokens(
    settings: RoutingSettings,
    mode: str,
    batch: StepBatch,
    passes: Engine,
    first: FirstPass,
    scores: Scores,
    schedule: Schedule,
    draws: Draws,
) -> Kept:
    """Kept tokens of every row: from the pass that ran with gradients, or from a separate gradient pass."""
    selection, inclusion_weight = select_tokens(settings, batch, scores.score, schedule, draws)
    index, auxiliary_loss = selection.index, first.auxiliary_loss
    if mode == "exact":
        assert first.values is not None  # from an ordinary forward
        values = first.values.gather(1, index[:, :, None].expand(-1, -1, first.values.shape[2]))
    else:
        assert first.context is not None  # from the modes that route keys and values
        values, auxiliary_loss = passes.gradient(
            batch.tokens, selection, first.context, keep_graph=mode == "kv", precision=settings.context_precision
        )
    targets = batch.targets.tokens.gather(1, index)
    coefficients = loss_coefficients(
        selection, batch.countable, token_weight=batch.token_weight, num_items=batch.num_items
    )
    row = torch.arange(index.shape[0], device=index.device)
    return Kept(values, targets, coefficients, inclusion_weight, row, index, selection.mask, auxiliary_loss)


def _keep_rows(
    settings: RoutingSettings, batch: StepBatch, passes: Engine, scores: Scores, schedule: Schedule, draws: Draws
) -> Kept:
    """Kept rows as a batch of their own, in an ordinary forward and backward."""
    selection, inclusion_weight = select_rows(settings, batch, scores.score, schedule, draws)
    row, valid = selection.index[0], selection.valid[0][:, None]
    values, auxiliary_loss = passes.plain(batch.rows(row))
    targets = batch.targets.tokens.index_select(0, row)
    counted = targets != settings.ignore_index
    coefficients = selection.weight[0][:, None] * counted / batch.divisor
    if batch.token_weight is not None:
        coefficients = coefficients * batch.token_weight.index_select(0, row)
    position = torch.arange(batch.shape[1], device=row.device).expand_as(targets)
    mask = torch.zeros_like(batch.countable).index_put_((row,), valid.expand_as(targets))
    weight = inclusion_weight[0][:, None] * counted
    return Kept(values, targets, coefficients, weight, row, position, mask, auxiliary_loss)
