"""The page of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cggr_train.report.page import write_page
from cggr_train.report.plots import draw_costs, draw_frontier, draw_kept, draw_losses
from cggr_train.report.tables import study_cells

if TYPE_CHECKING:
    from cggr_train.study.analysis import Outcome
    from cggr_train.study.settings import StudySettings


def write_study_page(
    path: Path,
    *,
    outcome: Outcome,
    verdict: Sequence[str],
    settings: StudySettings,
    study: Mapping[str, Any],
) -> None:
    """Write tables, plots and verdict.

    Args:
        path: HTML file to write.
        outcome: The figures.
        verdict: Sentences above the tables.
        settings: What was compared.
        study: First record of the study: devices, workers and versions.
    """
    train = settings.train
    write_page(
        path,
        "study.html.j2",
        title=f"Study: {train.model or train.config}",
        verdict=verdict,
        tables=study_cells(outcome),
        labels={arm.name: arm.title for arm in outcome.arms},
        rates=", ".join(f"{arm.title} {arm.learning_rate:g}" for arm in outcome.arms if arm.learning_rate),
        settings=settings,
        study=study,
        frontier=draw_frontier(outcome),
        losses=draw_losses(outcome),
        costs=draw_costs(outcome),
        kept=draw_kept(outcome) if outcome.kept else None,
    )
