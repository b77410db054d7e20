"""Recordings on the CPU: a pass is replayed by doing it again, and its results are put where the first ones are."""

from collections.abc import Callable
from typing import Any

import torch

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
        made = run()
        if self.reads is not None:
            raise NotRecordedError(self.reads)
        return made

    def wait(self) -> None:
        pass

    def random_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def set_random_state(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)
