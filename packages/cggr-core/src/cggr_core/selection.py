"""Which tokens are kept: the Selection that every later stage reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cggr_core.checks import check_at_least, check_float, check_same_device, check_shape
from cggr_core.sampling import compact
from cggr_core.slots import slots_in_steps

__all__ = ["Selection", "check_mask", "with_margin"]


@dataclass(frozen=True)
class Selection:
    """The kept tokens of a batch, in a shape that does not depend on the data.

    Attributes:
        index: [B, K] int64. K distinct positions in each row, ascending. Unused slots hold positions that are not kept,
            so that a scatter over all slots never writes twice.
        valid: [B, K] bool: which slots hold kept tokens.
        weight: [B, K] float32, 0 where not valid: ``sum(weight * nll) / countable`` estimates the mean nll.
        ratio: 0-dim float32: kept over countable tokens.
        shape: Shape [B0, S0] of the score. With scope "batch" B is 1 and ``index`` points into the flattened batch.
    """

    index: Tensor
    valid: Tensor
    weight: Tensor
    ratio: Tensor
    shape: tuple[int, int]

    @property
    def mask(self) -> Tensor:
        """[B0, S0] bool: True at the kept tokens."""
        B, _ = self.index.shape
        S = self.shape[0] * self.shape[1] // max(1, B)
        flat = torch.zeros(B, S, dtype=torch.bool, device=self.index.device)
        return flat.scatter_(1, self.index, self.valid).reshape(self.shape)

    def gather(self, tensor: Tensor) -> Tensor:
        """Rows of ``tensor`` at the slots.

        Args:
            tensor: [B0, S0, ...].

        Returns:
            [B, K, ...], also for slots that are not valid.

        Raises:
            ValueError: If the leading shape is not that of the score.
        """
        check_shape("tensor", tensor[(...,) + (0,) * max(0, tensor.dim() - 2)], self.shape, "that of the score")
        B, K = self.index.shape
        rest = tensor.shape[2:]
        rows = tensor.reshape(B, -1, *rest) if B else tensor
        index = self.index.reshape(B, K, *(1 for _ in rest)).expand(B, K, *rest)
        return rows.gather(1, index)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        *,
        weight: Tensor | None = None,
        countable: Tensor | None = None,
        capacity: int | None = None,
        margin: int = 0,
        within: Tensor | None = None,
    ) -> Selection:
        """The selection of the True entries of a mask.

        Args:
            mask: [B, S] bool.
            weight: [B, S] weight of each token; None for countable over kept, which makes the weighted loss the plain
                mean over the kept tokens.
            countable: [B, S] bool, the tokens that have a target; None for all of them.
            capacity: Slots K of each row. None reads the largest row count from the device (a synchronisation) and
                rounds it up so that shapes repeat, by an eighth or 8, at most by 64 and to S. If the capacity is too
                small, the last tokens of a row are dropped.
            margin: Positions before every True entry that are kept too, with a weight of 0: no loss, but gradients
                reach them.
            within: [B, S] bool, where such positions may be (not on padding); None for anywhere.

        Raises:
            TypeError: If ``mask``, ``countable`` or ``within`` is not bool.
            ValueError: If shapes or devices disagree.

        Example:
            >>> mask = torch.tensor([[True, False, True, False]])
            >>> Selection.from_mask(mask, capacity=2).index
            tensor([[0, 2]])
            >>> wide = Selection.from_mask(mask, capacity=3, margin=1)
            >>> wide.index, wide.weight
            (tensor([[0, 1, 2]]), tensor([[2., 0., 2.]]))
        """
        check_mask("mask", mask)
        countable = torch.ones_like(mask) if countable is None else countable
        check_mask("countable", countable, mask, "mask")
        wide = with_margin(mask, check_at_least("margin", margin, 0))
        if within is not None:
            check_mask("within", within, mask, "mask")
            wide = wide & (mask | within)
        B, S = mask.shape
        if capacity is None:
            largest = int(wide.sum(1).max()) if mask.numel() else 0
            capacity = slots_in_steps(largest, mask.shape[1])
        # At least one slot, empty if nothing is kept: models cannot run on zero tokens.
        capacity = min(S, max(check_at_least("capacity", capacity, 0), 1))
        keep = wide & (wide.cumsum(1) <= capacity)
        index, valid = compact(keep, capacity)
        kept, n = (keep & mask).sum(), countable.sum()
        if weight is None:
            slot_weight = (n / kept.clamp(min=1)).expand(B, capacity)
        else:
            check_shape("weight", check_float("weight", weight), mask.shape, "that of mask")
            check_same_device("weight", weight, "mask", mask)
            slot_weight = weight.gather(1, index)
        weighs = valid & mask.gather(1, index) if margin else valid
        slot_weight = slot_weight.to(torch.float32).masked_fill(~weighs, 0.0)
        return cls(index, valid, slot_weight, (kept / n.clamp(min=1)).to(torch.float32), (B, S))


def with_margin(mask: Tensor, margin: int) -> Tensor:
    """A mask ``[B, S]`` that is also True at the ``margin`` positions before every True entry.

    Example:
        >>> with_margin(torch.tensor([[False, False, False, True, True, False]]), 2).long()
        tensor([[0, 1, 1, 1, 1, 0]])
    """
    if not margin:
        return mask
    so_far, length = mask.cumsum(1), mask.shape[1]
    ahead = so_far[:, (torch.arange(length, device=mask.device) + margin).clamp(max=length - 1)]
    return mask | (ahead > so_far)


def check_mask(name: str, mask: Tensor, like: Tensor | None = None, like_name: str = "") -> None:
    """Raise unless ``mask`` is a bool tensor ``[B, S]``, of the shape and on the device of ``like``."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        # A label of -100 is true as a bool, too.
        labels = "; for labels, use labels != -100" if came == torch.int64 else ""
        raise TypeError(f"{name} must be a bool tensor, got {came}; use {name}.bool(){labels}")
    if like is not None:
        check_shape(name, mask, like.shape, f"that of {like_name}")
        check_same_device(name, mask, like_name, like)
    elif mask.dim() != 2:
        raise ValueError(f"{name} must be [B, S], got shape {tuple(mask.shape)}")
