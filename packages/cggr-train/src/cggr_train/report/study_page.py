"""The page of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cggr_train.report.explanation import explain
from cggr_train.report.page import write_page
from cggr_train.report.plots import NARROW, colour, draw_frontier, draw_kept, draw_losses, draw_losses_by_tokens
from cggr_train.report.tables import study_cells
from cggr_train.study.frontier import non_dominated, points

if TYPE_CHECKING:
    from cggr_train.recorded import StepGraph
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
        title="Does training on part of the tokens pay?",
        what=Path(train.model).name if train.model else f"A {train.config} model from scratch",
        answer=verdict[0],
        findings=verdict[1:],
        explained=[
            (arm.title, colour(arm, outcome), explain(arm, outcome.arms, supervised=study.get("supervised", 1.0)))
            for arm in outcome.arms
        ],
        colours={arm.name: colour(arm, outcome) for arm in outcome.arms},
        tables=study_cells(outcome),
        labels={arm.name: arm.title for arm in outcome.arms},
        rates=", ".join(f"{arm.title} {arm.learning_rate:g}" for arm in outcome.arms if arm.learning_rate),
        settings=settings,
        study=study,
        captured=captured_steps(train.cuda_graph, outcome),
        losses=_sizes(draw_losses, outcome),
        by_tokens=_sizes(draw_losses_by_tokens, outcome),
        frontier=_sizes(draw_frontier, outcome),
        joined=len(non_dominated(points(outcome))) > 1,
        kept=_sizes(draw_kept, outcome) if outcome.kept else None,
    )


def captured_steps(cuda_graph: StepGraph, outcome: Outcome) -> str:
    """A sentence on which arms' steps ran as CUDA graphs; nothing where none did.

    Args:
        cuda_graph: What the study was asked for.
        outcome: The figures.
    """
    if cuda_graph is True:
        return "Every arm's optimizer step was captured and replayed as one CUDA graph."
    replayed = [arm.title for arm in outcome.arms if outcome.replayed.get(arm.name)]
    others = [arm.title for arm in outcome.arms if not outcome.replayed.get(arm.name)]
    if not replayed:
        return ""
    if not others:
        return "The forward and backward passes of every arm were captured and replayed as CUDA graphs."
    return (
        f"Forward and backward passes of some arms were captured and replayed as CUDA graphs: {'; '.join(replayed)}. "
        f"The others' were launched one operation at a time, as no capture was possible or faster: {'; '.join(others)}."
    )


def _sizes(draw: Callable[..., bytes | None], outcome: Outcome) -> tuple[bytes, bytes] | None:
    """A plot for a wide page and one for a phone."""
    wide, narrow = draw(outcome), draw(outcome, width=NARROW)
    return None if wide is None or narrow is None else (wide, narrow)
