"""Metrics of a step, computed from what it has anyway; see :attr:`cggr_core.CGGRModel.metrics`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cggr_core.step.router import Scores


def step_metrics(
    loss: Tensor, *, countable: Tensor, kept: Tensor, scores: Scores, auxiliary_loss: Tensor | None
) -> dict[str, Any]:
    """Metrics as tensors on their device.

    Args:
        loss: The step's.
        countable: bool ``[B, S]``.
        kept: bool ``[B, S]``, the kept countable tokens.
        scores: What the selection was made from.
        auxiliary_loss: The expert routers' part of the loss, or ``None``.
    """
    count, kept_count = countable.sum(), kept.sum()
    metrics: dict[str, Any] = {
        "loss": loss.detach(),
        "keep_ratio": kept_count / count.clamp(min=1),
        "kept_tokens": kept_count,
        "countable_tokens": count,
    }
    if auxiliary_loss is not None:
        metrics["auxiliary_loss"] = auxiliary_loss.detach()
    return metrics | _score_metrics(scores, countable, kept, count.clamp(min=1), kept_count.clamp(min=1))


def _score_metrics(
    scores: Scores, countable: Tensor, kept: Tensor, count: Tensor, kept_count: Tensor
) -> dict[str, Tensor]:
    metrics, statistics = dict(scores.metrics), scores.statistics
    if scores.score is not None:
        dropped = countable & ~kept
        metrics["score_kept"] = (scores.score * kept).sum() / kept_count
        metrics["score_dropped"] = (scores.score * dropped).sum() / dropped.sum().clamp(min=1)
    if statistics is None:
        return metrics
    if statistics.gradnorm is not None:
        squares = statistics.gradnorm.square()
        metrics["gradnorm_kept"] = (squares * kept).sum() / (squares * countable).sum().clamp(min=1e-30)
    if statistics.confidence is not None:
        metrics["confidence"] = (statistics.confidence * countable).sum() / count
    if scores.full_depth and statistics.nll is not None:
        metrics["full_loss"] = (statistics.nll * countable).sum() / count
    return metrics
