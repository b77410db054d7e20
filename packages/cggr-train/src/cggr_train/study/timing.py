"""Time and memory of an arm's step, measured with nothing else running."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from cggr_train.memory import memory_in_use, peak_memory, reset_peak_memory
from cggr_train.recorded import EAGER_STEPS
from cggr_train.study.arms import Arm
from cggr_train.study.context import StudyContext

WARMUP_STEPS = EAGER_STEPS + 2
"""The last two are for recording, if steps are recorded: whole, or by a method that probes its model first."""
BLOCK = 4
"""Steps between two clock readings: waiting after each step would stall an accelerator."""


def time_steps(context: StudyContext, arm: Arm, *, seconds: float) -> dict[str, Any]:
    """Run steps for a few seconds at a learning rate of 0, so that an arm that will diverge is timed too.

    Args:
        context: The study.
        arm: The arm to time.
        seconds: How long; at least two blocks of steps are timed.

    Returns:
        ``step_seconds`` (mean of each block), ``peak_bytes``, ``start_bytes`` (held before the first step),
        ``engine``, and ``replayed``: whether the last step came from a CUDA graph that the method captured by itself.
    """
    gc.collect()  # do not count memory of the previous arm
    session = context.session(
        arm, context.settings.train.seed, steps=10**6, warmup_steps=1, eval_sequences=1, still=True
    )
    device = context.device
    reset_peak_memory(device)
    start_bytes = memory_in_use(device)
    blocks: list[float] = []
    started = 0.0

    def on_step(loss: torch.Tensor, rate: float) -> None:
        nonlocal started
        timed = session.progress.step - WARMUP_STEPS
        if timed >= 0 and timed % BLOCK == 0:
            with session.clock.paused():
                now = time.perf_counter()
                if timed:
                    blocks.append((now - started) / BLOCK)
                started = now

    session.train(on_step, stop=lambda: len(blocks) >= 2 and sum(blocks) * BLOCK >= seconds)
    return {
        "step_seconds": blocks,
        "peak_bytes": peak_memory(device),
        "start_bytes": start_bytes,
        "engine": str(session.learner.metrics.get("engine", "")),
        "replayed": session.learner.replayed,
    }
