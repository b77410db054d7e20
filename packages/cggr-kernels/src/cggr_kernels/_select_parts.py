"""Plain-torch parts of the op ``select``."""

from __future__ import annotations

import torch
from torch import Tensor


def seed_step(seed: int) -> int:
    """The offset that a seed adds to the counter before hashing, a signed 64-bit integer."""
    step = seed * 0xD1342543DE82EF95 & (1 << 64) - 1
    return step - (1 << 64) if step >= 1 << 63 else step


def kept_counts(countable: Tensor, ratio: float, capacity: int, at_least: int) -> tuple[Tensor, Tensor]:
    """Countable tokens and tokens to keep of each row, both int64 ``[B]``."""
    n_B = countable.sum(1)
    k_B = (n_B.to(torch.float64) * ratio).round().to(torch.int64).clamp(min=at_least)
    return n_B, torch.minimum(k_B, n_B).clamp(max=capacity)


def top_mask(key: Tensor, countable: Tensor, k: Tensor) -> Tensor:
    """The ``k`` countable entries of each row with the highest keys; ties go to the lower position."""
    order_BS = key.masked_fill(~countable, -torch.inf).argsort(dim=1, descending=True, stable=True)
    first_BS = (torch.arange(key.shape[1], device=key.device) < k[:, None]).expand_as(order_BS)
    return torch.zeros_like(countable).scatter_(1, order_BS, first_BS) & countable
