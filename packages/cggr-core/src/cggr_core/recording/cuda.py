"""Recording on a CUDA device."""

from __future__ import annotations

import gc
import random
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from cggr_core.recording.replay import NotRecordedError, Replay

_READ = "called a synchronizing CUDA operation"


class CudaClock:
    """Times steps by events, without waiting for the device.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        """See :class:`~cggr_core.recording.ledger.Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        """See :class:`~cggr_core.recording.ledger.Clock`."""
        return start.elapsed_time(end) / 1e3 if end.query() else None

    def now(self) -> float:
        """See :class:`~cggr_core.recording.ledger.Clock`."""
        return time.perf_counter()


class CudaGraphs:
    """Records passes in one memory pool, on one stream.

    Args:
        device: A CUDA device.

    Attributes:
        held_bytes: See :class:`~cggr_core.recording.replay.Graphs`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._last: torch.cuda.Stream | None = None
        self.held_bytes = 0

    def capture(self, run: Callable[[], list[Tensor]]) -> tuple[Replay, list[Tensor]]:
        """See :class:`~cggr_core.recording.replay.Graphs`."""
        self.wait()
        torch.clear_autocast_cache()
        collects = gc.isenabled()
        # What an earlier pass left in cycles keeps memory of the pool. A full collection takes as long as steps do.
        gc.collect(1)
        gc.disable()  # deleting another graph during a capture would end the capture
        try:
            return self._captured(run)
        finally:
            if collects:
                gc.enable()

    def _captured(self, run: Callable[[], list[Tensor]]) -> tuple[Replay, list[Tensor]]:
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            # This thread only: data loaders pin memory in another.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                made = run()
                graph.capture_end()
            except BaseException:
                self._give_up(graph)
                raise
            finally:
                torch.clear_autocast_cache()  # of copies that live in the pool
        self.wait()
        self.held_bytes += torch.cuda.memory_reserved(self._device) - before
        self.check_room(0)

        def replay() -> None:
            stream = torch.cuda.current_stream(self._device)
            if self._last is not None and self._last != stream:
                stream.wait_stream(self._last)
            self._last = stream
            graph.replay()

        return replay, made

    def allocated_bytes(self) -> int:
        """See :class:`~cggr_core.recording.replay.Graphs`."""
        return torch.cuda.memory_allocated(self._device)

    def check_room(self, needed: int) -> None:
        """See :class:`~cggr_core.recording.replay.Graphs`."""
        torch.cuda.empty_cache()  # cached memory must be released before the pool can use it
        free, _ = torch.cuda.mem_get_info(self._device)
        held = max(self.held_bytes, needed)  # the recordings share their memory
        left = free - (held - self.held_bytes)
        if left < held:
            raise NotRecordedError(
                f"recordings would hold {held / 1e9:.1f} GB of the device's memory and leave "
                f"{max(left, 0) / 1e9:.1f} GB, less than an eager step needs"
            )

    def watched(self, run: Callable[[], Any]) -> Any:
        """See :class:`~cggr_core.recording.replay.Graphs`."""
        before, drawn, picked = torch.cuda.get_sync_debug_mode(), torch.get_rng_state(), random.getstate()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                made = run()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        if not torch.equal(torch.get_rng_state(), drawn) or random.getstate() != picked:
            raise NotRecordedError("the step draws random numbers on the host, which a replay would not do")
        for warning in said:
            if _READ in str(warning.message):
                where = f"{Path(warning.filename).name}, line {warning.lineno}"
                raise NotRecordedError(f"the step makes the host wait for the device ({where})")
        return made

    def wait(self) -> None:
        """See :class:`~cggr_core.recording.replay.Graphs`."""
        torch.cuda.synchronize(self._device)

    def random_state(self) -> Tensor:
        """See :class:`~cggr_core.recording.replay.Graphs`."""
        return torch.cuda.get_rng_state(self._device)

    def set_random_state(self, state: Tensor) -> None:
        """See :class:`~cggr_core.recording.replay.Graphs`."""
        torch.cuda.set_rng_state(state, self._device)

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a failed capture; torch before 2.13 leaves its allocator and generator in capture mode."""
        with suppress(RuntimeError):
            graph.capture_end()
        with suppress(RuntimeError):
            cast(Any, torch._C)._cuda_endAllocateToPool(self._device.index or 0, self._pool)
        with suppress(RuntimeError):  # any successful capture resets the generator
            number = torch.zeros((), device=self._device)
            other = torch.cuda.CUDAGraph()
            other.capture_begin(capture_error_mode="thread_local")
            number.add_(1)
            other.capture_end()
