"""Numbers the random draws: counted on the device, so that a replayed graph draws again."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_core.schedule import Schedule


class Draws:
    """Counts the draws of a schedule on the device that makes them.

    Args:
        schedule: Where the count starts, and is kept on the CPU.

    Example:
        >>> draws = Draws(Schedule())
        >>> draws.next(torch.device("cpu")), draws.next(torch.device("cpu")), draws.count
        (0, 1, 2)
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._on_device: Tensor | None = None

    def next(self, device: torch.device) -> int | Tensor:
        """Number of this forward's draw: an int on the CPU, elsewhere a 0-dim int64 tensor."""
        if device.type == "cpu":
            return self._schedule.next_draw()
        if self._on_device is None or self._on_device.device != device:
            self._on_device = torch.full((), self.count, dtype=torch.int64, device=device)
        draw = self._on_device.clone()
        self._on_device.add_(1)
        return draw

    @property
    def count(self) -> int:
        """Draws so far; waits for the device."""
        return self._schedule.state_dict()["draws"] if self._on_device is None else int(self._on_device)

    def restart(self) -> None:
        """Continue counting from the schedule's count."""
        self._on_device = None
