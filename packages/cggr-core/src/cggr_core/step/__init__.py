"""One training step: :func:`run_step`, from statistics to loss, and its parts."""

from cggr_core.step.batch import StepBatch
from cggr_core.step.deferred import DeferredErrors, findings
from cggr_core.step.draws import Draws
from cggr_core.step.router import Observation, Router, ScoreRequest, Scores
from cggr_core.step.run import StepResult, run_step

__all__ = [
    "DeferredErrors",
    "Draws",
    "Observation",
    "Router",
    "ScoreRequest",
    "Scores",
    "StepBatch",
    "StepResult",
    "findings",
    "run_step",
]
