"""Recordings on the CPU: a replay runs the pass again and writes its results over the first ones."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cggr_core.recording.replay import NotRecordedError


class Reenacted:
    """What :class:`cggr_core.recording.cuda.CudaGraphs` is on a GPU."""

    held_bytes = 0
    reads: str | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captured = 0

    def capture(self, run: Callable[[], list[torch.Tensor]]):
        self.captured += 1
        places = [made.detach().clone() for made in run()]

        def replay() -> None:
            with torch.enable_grad():  # a replay stands inside an autograd function
                again = run()
            for place, made in zip(places, again, strict=True):
                place.copy_(made.detach())

        return replay, places

    def watched(self, run: Callable[[], Any]) -> Any:
        with _HostReads():
            made = run()
        if self.reads is not None:
            raise NotRecordedError(self.reads)
        return made

    def wait(self) -> None:
        pass

    def allocated_bytes(self) -> int:
        return 0

    def check_room(self, needed: int) -> None:
        pass

    def random_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


class HostClock:
    """What :class:`cggr_core.recording.cuda.CudaClock` is on a GPU."""

    def __init__(self, device: torch.device) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def now(self) -> float:
        return time.perf_counter()


class _HostReads(TorchDispatchMode):
    """Refuses reads of a tensor's values by transformers, which does not know that they are free on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            if "/transformers/" in frame.f_code.co_filename:
                raise NotRecordedError(f"the step makes the host wait for the device (line {frame.f_lineno})")
        return func(*args, **(kwargs or {}))
