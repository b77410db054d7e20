"""The processes (ranks) of a run, started by ``torchrun`` or ``accelerate launch``; or a single one.

A run on several ranks equals the run on one: every batch is split by rows, gradients are averaged by
``DistributedDataParallel``, and the ranks agree on everything that decides what happens next (the clock, a stop, an
error). Only rank 0 prepares, writes and shows progress.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cggr_train.device import pick_device
from cggr_train.errors import InputError, RunError

T = TypeVar("T")

# While rank 0 prepares the text, the others wait.
_PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Ranks:
    """This process within the run.

    Attributes:
        rank: From 0 on.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process prepares, writes and shows progress."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This rank's rows of a batch."""
        share = batch_size // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model to call in training: gradients are averaged over the ranks."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device.index])

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean of each number over all ranks."""
        return (self.sum(torch.tensor(values, dtype=torch.float64)) / self.size).tolist()

    def gather(self, value: Tensor) -> list[Tensor]:
        """Gather a CPU tensor of the same shape from every rank."""
        if self.size == 1:
            return [value]
        found = [torch.empty_like(value) for _ in range(self.size)]
        dist.all_gather(found, value)
        return found

    def agree(self, any_rank: bool, largest: float) -> tuple[bool, float]:
        """Whether the condition holds on any rank, and the largest of the ranks' numbers."""
        if self.size == 1:
            return any_rank, largest
        both = torch.tensor([float(any_rank), largest], dtype=torch.float64)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return bool(both[0]), float(both[1])

    def on_rank_zero(self, work: Callable[[], T]) -> T | None:
        """Run something on rank 0 while the others wait.

        Returns:
            What ``work`` returned on rank 0, ``None`` on the others.

        Raises:
            BaseException: On rank 0 what ``work`` raised.
            RunError: On the others, if it did.
        """
        result, error = None, None
        if self.main:
            try:
                result = work()
            except BaseException as raised:  # Ctrl-C too: the others must not wait forever
                error = raised
        failed, _ = self.agree(error is not None, 0.0)
        if error is not None:
            raise error
        if failed:
            raise RunError(f"rank {self.rank} stopped because rank 0 failed")
        return result


ALONE = Ranks()


def without_averaging(model: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """Delay averaging the gradients until the last micro-batch of a step."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()


@contextmanager
def joined_ranks(device: str, *, batch_size: int) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the other processes of this run, if there are any.

    Args:
        device: ``auto`` or the name of a device; without an index every process uses its own.
        batch_size: Rows to split.

    Yields:
        This process's rank information and its device.

    Raises:
        InputError: If the device cannot be used, or the rows cannot be split evenly.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    picked = pick_device(device)
    if size == 1:
        yield ALONE, picked
        return
    if batch_size % size:
        raise InputError(f"--batch-size must be a multiple of the {size} processes, got {batch_size}")
    if picked.type != "cpu":
        if picked.index is not None and device != "auto":
            raise InputError(f"--device {device} is a single device for {size} processes; give {picked.type}")
        picked = torch.device(picked.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(picked.index)
    # Both are named: ranks communicate decisions on the CPU, and not every torch adds gloo to a device's own backend.
    own = "" if picked.type == "cpu" else f",{picked.type}:{dist.get_default_backend_for_device(picked)}"
    dist.init_process_group(f"cpu:gloo{own}", timeout=_PATIENCE)
    yield Ranks(dist.get_rank(), size), picked
    # Not after an error: other ranks may be inside a collective, and it is the launcher's job to end them.
    dist.destroy_process_group()
