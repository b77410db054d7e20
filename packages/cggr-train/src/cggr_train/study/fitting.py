"""Measures how many sequences of an arm fit into memory at a time, largest first."""

from __future__ import annotations

import dataclasses
from typing import Any

from cggr_train.memory import free_memory, is_out_of_memory, peak_memory, reset_peak_memory
from cggr_train.study.arms import Arm
from cggr_train.study.context import StudyContext
from cggr_train.study.timing import WARMUP_STEPS

STEPS = 2
"""Steps per size: the optimizer's state exists after the first. Steps that are captured hold more."""


def fit_arm(context: StudyContext, arm: Arm, *, limit: int) -> dict[str, Any]:
    """The largest micro-batch whose step stays within ``limit`` bytes, without checkpointing if possible.

    Candidates are the divisors of the batch, so that the step does not change.

    Args:
        context: The study.
        arm: The arm to fit. The checkpointed control always checkpoints, the equal-memory control never.
        limit: In bytes: the allocator's peak, or the resident set on a CPU.

    Returns:
        ``micro_batch``, ``checkpointing`` and ``peak_bytes``; ``micro_batch`` is None if not even one sequence fits,
        and ``peak_bytes`` is what it needs.
    """
    sizes = [size for size in range(arm.batch_size, 0, -1) if arm.batch_size % size == 0]
    ways = [True] if arm.checkpointing else [False] if arm.memory_of is not None else [False, True]
    peak: int | None = None
    for checkpointing in ways:
        for size in sizes:
            tried = dataclasses.replace(arm, micro_batch=size, checkpointing=checkpointing)
            peak = peak_of_steps(context, tried)
            if peak is not None and peak <= limit:
                return {"micro_batch": size, "checkpointing": checkpointing, "peak_bytes": peak}
    return {"micro_batch": None, "checkpointing": ways[-1], "peak_bytes": peak}


def peak_of_steps(context: StudyContext, arm: Arm) -> int | None:
    """Peak memory of a few steps of an arm; None if the device ran out of memory."""
    reset_peak_memory(context.device)
    peak = _take_steps(context, arm)
    free_memory(context.device)  # what the steps held
    return peak


def _take_steps(context: StudyContext, arm: Arm) -> int | None:
    seed = context.settings.train.seed
    steps = WARMUP_STEPS if context.device.type == "cuda" and context.cuda_graph else STEPS
    try:
        session = context.session(arm, seed, steps=10**6, warmup_steps=1, eval_sequences=1, still=True)
        session.train(lambda loss, rate: None, stop=lambda: session.progress.step >= steps)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return peak_memory(context.device)
