"""Routed steps recorded as CUDA graphs and replayed, so that a launch-bound step pays its launch overhead only once."""

from cggr_core.recording.calls import StepCall, StepOutcome
from cggr_core.recording.recorder import Recorder

__all__ = ["Recorder", "StepCall", "StepOutcome"]
