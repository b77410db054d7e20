"""A learner whose forward and backward are one CUDA graph: what a small model's step costs without its launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_train.learner import Learner

WARMUP = 3


class GraphedLearner:
    """Records the first step of a learner and replays it on every later batch.

    All batches must have the first one's shape, and the keep ratio must not move. A replay writes the gradients into
    the tensors of the recording; the loss that is returned has nothing left to do in its ``backward()``.

    Args:
        learner: Its model must be on a CUDA device.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._graph: torch.cuda.CUDAGraph | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._learner, name)

    def loss(
        self, input_ids: Tensor, *, num_items: float | None = None, draw: int | None = None, first_row: int = 0
    ) -> Tensor:
        """See :class:`cggr_train.learner.Learner`; gradients are already there when it returns."""
        if self._graph is None:
            self._record(input_ids, num_items, first_row)
        assert self._graph is not None
        self._input.copy_(input_ids)
        self._draw.fill_(draw) if draw is not None else self._draw.add_(1)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._loss.detach().requires_grad_()

    def _record(self, input_ids: Tensor, num_items: float | None, first_row: int) -> None:
        parameters = [parameter for parameter in self._learner.model.parameters() if parameter.requires_grad]
        self._input = input_ids.clone()
        # on the device, or every replay would make the choices of the recorded step
        self._draw = torch.zeros((), dtype=torch.int64, device=input_ids.device)
        cached = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)  # else the recording would read weights that were cast before it
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    self._step(num_items, first_row).backward()
                    for parameter in parameters:
                        parameter.grad = None
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._loss = self._step(num_items, first_row)
                self._loss.backward()
        finally:
            torch.set_autocast_cache_enabled(cached)
        self._gradients = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
        self._graph = graph

    def _step(self, num_items: float | None, first_row: int) -> Tensor:
        draw: Any = self._draw
        return self._learner.loss(self._input, num_items=num_items, draw=draw, first_row=first_row)
