"""Routed steps recorded as CUDA graphs and replayed: what a launch-bound step costs the host is paid once."""

from cggr_core.recording.calls import StepCall, StepOutcome
from cggr_core.recording.recorder import Recorder

__all__ = ["Recorder", "StepCall", "StepOutcome"]
