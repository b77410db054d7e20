"""Sums and collections over the ranks of a distributed run; on one rank, the value itself."""

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_from_ranks", "largest_over_ranks", "sum_over_ranks", "world_size"]


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of ``value`` over all ranks."""
    if world_size() > 1:
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value)
    return value


def largest_over_ranks(value: Tensor) -> Tensor:
    """The largest ``value`` of all ranks, entry by entry."""
    if world_size() > 1:
        value = value.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def gather_from_ranks(value: Tensor) -> Tensor:
    """``value`` ``[n, ...]``, of one shape on all ranks, one after the other in their order: ``[ranks * n, ...]``."""
    ranks = world_size()
    if ranks == 1:
        return value
    parts = value.new_empty(ranks * value.shape[0], *value.shape[1:])
    dist.all_gather(list(parts.chunk(ranks)), value.contiguous())
    return parts
