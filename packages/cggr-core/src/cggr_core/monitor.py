"""Copies a few numbers per step from the device to the host without waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Monitor"]


def capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on the current stream of ``device``."""
    if device.type == "cpu":
        return False
    capturing = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return capturing is not None and capturing()


class Monitor:
    """Posts small tensors and reads them back when they have arrived.

    On CPU a posted value can be read at once. From other devices it is copied without blocking, behind an event, and
    can be read once the copy is done: usually one step later. While a graph is being captured, and inside of
    ``torch.compile``, nothing is posted.

    Example:
        >>> monitor = Monitor()
        >>> monitor.post(torch.tensor([1.0, 2.0]))
        >>> monitor.read()
        [1.0, 2.0]
        >>> monitor.read() is None
        True
    """

    def __init__(self) -> None:
        self._ready: list[float] | None = None
        self._pending: list[tuple[Tensor, torch.Event]] = []
        self._spare: list[Tensor] = []

    def __getstate__(self) -> dict[str, object]:
        # Events cannot be copied or pickled; a copy starts with nothing posted.
        return {"_ready": None, "_pending": [], "_spare": []}

    def post(self, values: Tensor) -> None:
        """Start copying ``values`` [n] to the host."""
        if torch.compiler.is_compiling():
            return
        values = values.detach()
        if values.device.type == "cpu":
            self._ready = _numbers(values)
            return
        if capturing(values.device):
            return
        buffer = self._buffer(values)
        buffer.copy_(values, non_blocking=True)
        event = torch.Event(values.device)
        event.record(torch.accelerator.current_stream(values.device))
        self._pending.append((buffer, event))

    def _buffer(self, values: Tensor) -> Tensor:
        for i, buffer in enumerate(self._spare):
            if buffer.shape == values.shape and buffer.dtype == values.dtype:
                return self._spare.pop(i)
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True)

    def read(self, *, wait: bool = False) -> list[float] | None:
        """The newest value that has arrived and was not read before, or None.

        Args:
            wait: Wait for everything posted so far. The host then never runs more than a step ahead, and what it
                reads does not depend on timing.
        """
        # Querying an event would break the capture of a graph.
        if self._pending and capturing(self._pending[0][1].device):
            return None
        while self._pending and (wait or self._pending[0][1].query()):
            buffer, event = self._pending.pop(0)
            if wait:
                event.synchronize()
            self._ready = _numbers(buffer)
            self._spare.append(buffer)
        ready, self._ready = self._ready, None
        return ready


def _numbers(values: Tensor) -> list[float]:
    return [float(value) for value in values.tolist()]
