"""Routed steps recorded as CUDA graphs and replayed, so that a launch-bound step pays its launch overhead only once."""

from cggr_core.recording.calls import Outcome, PassCall, StepCall
from cggr_core.recording.recorder import Recorder, StepRecorder
from cggr_core.slots import slots_in_buckets

__all__ = ["Outcome", "PassCall", "Recorder", "StepCall", "StepRecorder", "slots_in_buckets"]
