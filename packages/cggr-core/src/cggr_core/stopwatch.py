"""Times parts of a step on a device without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cggr_core.monitor import capturing

__all__ = ["Stopwatch"]


class Stopwatch:
    """Adds up the time that blocks of code take on their device.

    Uses the clock on the CPU, and on other devices two events on the current stream, which cost the host almost
    nothing. Nothing is measured during a graph capture.

    Example:
        >>> stopwatch = Stopwatch()
        >>> with stopwatch.measure(torch.device("cpu")):
        ...     _ = torch.ones(8).sum()
        >>> stopwatch.read() > 0
        True
        >>> stopwatch.read()
        0.0
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._running: list[tuple[torch.Event, torch.Event]] = []

    def __getstate__(self) -> dict[str, object]:
        # Events cannot be copied or pickled; a copy starts at zero.
        return {"_seconds": 0.0, "_running": []}

    @contextmanager
    def measure(self, device: torch.device) -> Iterator[None]:
        """Time the block on ``device``."""
        if device.type == "cpu":
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started
            return
        if capturing(device):
            yield
            return
        start, end = torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True)
        start.record(torch.accelerator.current_stream(device))
        yield
        end.record(torch.accelerator.current_stream(device))
        self._running.append((start, end))
        # Finished blocks are added right away, so that the list stays short even if nobody reads it.
        while self._running[0][1].query():
            self._add()
            if not self._running:
                break

    def read(self) -> float:
        """Seconds since the last reading; waits for the device."""
        while self._running:
            self._running[0][1].synchronize()
            self._add()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _add(self) -> None:
        start, end = self._running.pop(0)
        self._seconds += start.elapsed_time(end) / 1000
