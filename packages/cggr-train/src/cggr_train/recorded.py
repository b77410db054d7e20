"""Optimizer steps captured as one CUDA graph, which removes the launch overhead of small models."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from cggr_train.errors import InputError, RunError
from cggr_train.learner import Routing
from cggr_train.optimizer_step import OptimizerStep

StepGraph = bool | Literal["auto"]
"""What is captured as CUDA graphs: the whole step, nothing, or the passes of methods that gain from it."""
EAGER_STEPS = 3
"""Steps before the recording: they compile kernels, create the optimizer's state, and train like any other."""


def check_recordable(device: torch.device, method: str, routing: Routing, *, processes: int = 1) -> None:
    """Refuse to record a step whose replay would differ.

    Args:
        device: Where the step runs.
        method: See :func:`cggr_train.learner.build_learner`.
        routing: Settings of the routed methods.
        processes: Number of processes that share the step.

    Raises:
        InputError: With the reason, and what to do.

    Example:
        >>> check_recordable(torch.device("cpu"), "standard", Routing())
        Traceback (most recent call last):
        cggr_train.errors.InputError: --cuda-graph needs a CUDA device, but this runs on cpu; leave it out
    """
    if device.type != "cuda":
        raise InputError(f"--cuda-graph needs a CUDA device, but this runs on {device.type}; leave it out")
    if processes > 1:
        raise InputError(
            f"--cuda-graph captures the step of a single process, but this run has {processes}, and communication "
            "between processes cannot be captured; leave it out"
        )
    if method == "standard":
        return
    if routing.ratio_warmup_steps:
        raise InputError(
            "--cuda-graph captures a fixed number of kept tokens, but --ratio-warmup-steps "
            f"{routing.ratio_warmup_steps} changes it; leave one of them out"
        )
    if method == "random":
        return
    if routing.router == "remembered":
        raise InputError(
            "--cuda-graph cannot capture --router remembered, whose scores the host reads and writes in every step; "
            "leave one of them out"
        )
    if routing.selection == "supervised":
        raise InputError(
            "--cuda-graph cannot capture --selection supervised, whose number of kept tokens the host reads in every "
            "step; leave one of them out"
        )


class RecordedStep:
    """Runs some steps eagerly, records one, and replays it for all later ones.

    Batches must have the shape of the first ones. Values that change from step to step are read on the device: the
    batches, the learning rate, the draw number and the loss's number of items.

    Args:
        step: The step. Its optimizer must be capturable (:func:`cggr_train.loop.build_optimizer`), and its model on a
            CUDA device, which must be the current one.
        device: That device.
    """

    def __init__(self, step: OptimizerStep, device: torch.device) -> None:
        self._step, self._device = step, device
        self._batches: list[Tensor] | None = None
        self._rate = torch.zeros((), device=device)
        self._draw = torch.zeros((), dtype=torch.int64, device=device)
        self._items: Tensor | None = None
        self._side = torch.cuda.Stream(device)
        self._taken = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._loss: Tensor | None = None

    def __call__(self, batches: Sequence[Tensor], *, rate: float, draw: int, num_items: float | None) -> Tensor:
        """Run a step; see :meth:`OptimizerStep.__call__`.

        Raises:
            InputError: If the step cannot run at all.
            RunError: If it cannot be recorded.
        """
        if self._batches is None:
            self._batches = [batch.clone() for batch in batches]
        for own, batch in zip(self._batches, batches, strict=True):
            own.copy_(batch)
        self._rate.fill_(rate)
        self._draw.fill_(draw)
        if num_items is not None:
            if self._items is None:
                self._items = torch.zeros((), device=self._device)
            self._items.fill_(num_items)
        self._taken += 1
        if self._taken <= EAGER_STEPS:
            return self._run_eagerly(self._batches)
        if self._graph is None:
            self._graph = self._recorded(self._batches)
        self._graph.replay()
        assert self._loss is not None  # of the recording
        return self._loss.clone()

    def _run_eagerly(self, batches: Sequence[Tensor]) -> Tensor:
        # Not on the default stream, which cannot be captured.
        current = torch.cuda.current_stream(self._device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side), warnings.catch_warnings():
            # This warning is for users who never capture; these are the warm-up steps before a capture.
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            loss = self._step(batches, rate=self._rate, draw=self._draw, num_items=self._items)
        current.wait_stream(self._side)
        return loss

    def _recorded(self, batches: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        from cggr_core.routing import whole_rows  # transformers takes a second to import

        graph = torch.cuda.CUDAGraph()
        try:
            # A batch's rows are cut from a run of tokens: nothing is padding, and positions do not restart.
            with whole_rows(), torch.cuda.graph(graph, stream=self._side):
                self._loss = self._step(batches, rate=self._rate, draw=self._draw, num_items=self._items)
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise RunError(f"the step cannot be captured ({reason}); leave --cuda-graph out") from error
        return graph
