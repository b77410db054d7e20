"""The average of a run's latest weights, whatever its length: what a study evaluates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DECAY = 8
"""The average covers about a tenth of the steps so far: step / (DECAY + 2)."""


class RunningAverage:
    """Polynomial-decay average of a model's parameters.

    After step t the average moves by ``(DECAY + 1) / (t + DECAY)`` towards the weights, so that its window is a fixed
    share of the run so far. At every point, the averaged weights of a run at a constant learning rate are close to
    those of a run whose learning rate was decayed up to that point, so one run can be read after any number of steps,
    tokens or seconds.

    Source: Shamir and Zhang, "Stochastic gradient descent for non-smooth optimization: convergence results and optimal
    averaging schemes", 2013.

    Args:
        model: Its trainable parameters are averaged; on the same device and in their dtype.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> average = RunningAverage(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.fill_(2.0)
        >>> average.update(1)
        >>> with average.average_parameters():
        ...     model.weight.item()
        2.0
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._values = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after ``step`` steps, from 1."""
        torch._foreach_lerp_(self._values, self._parameters, (DECAY + 1) / (step + DECAY))

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Swap in the averaged weights inside the block, and restore the model's own after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for number, parameter in enumerate(self._parameters):
            parameter.data, self._values[number] = self._values[number], parameter.data

    def state_dict(self) -> list[Tensor]:
        """The averaged values, in the order of the parameters."""
        return self._values

    def load_state_dict(self, values: list[Tensor]) -> None:
        """Continue from :meth:`state_dict`."""
        for own, value in zip(self._values, values, strict=True):
            own.copy_(value)
