"""Merges and splits rows of keys, values and hidden states, and passes on exactly the gradients that a mode allows.

These are autograd functions whose backward passes copy rows once; autograd's own backward of the same scatters would
copy the full-length gradient several times. Models use keys and values as ``[B, H, S, D]``, but projections lay them
out in memory by position. Rows are read and written in that order and stay in it, so that neither the attention nor the
projections' backward has to copy them again.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Positions of some rows in a batch, computed once for all layers of a pass.

    Attributes:
        index: Distinct positions, int64 ``[B, K]``.
        length: Positions ``S`` of a full row.
        valid: bool ``[B, K]``, the slots that hold kept tokens rather than fillers; ``None`` for all.
    """

    index: Tensor
    length: int
    valid: Tensor | None = None

    @cached_property
    def flat(self) -> Tensor:
        """Indices into the flattened batch, int64 ``[B * K]``."""
        rows = torch.arange(self.index.shape[0], device=self.index.device)
        return (self.index + rows[:, None] * self.length).flatten()

    def take(self, full: Tensor) -> Tensor:
        """The rows ``[B, K, ...]`` of ``full`` ``[B, S, ...]``."""
        batch, slots = self.index.shape
        flat = full.reshape(batch * self.length, full.shape[2:].numel())
        return flat.index_select(0, self.flat).view(batch, slots, *full.shape[2:])

    def write(self, rows: Tensor, full: Tensor) -> None:
        """Put ``rows`` ``[B, K, ...]`` into ``full`` ``[B, S, ...]``, which is contiguous."""
        size = full.shape[2:].numel()
        full.view(-1, size).index_copy_(0, self.flat, rows.reshape(self.flat.shape[0], size))

    def only_valid(self, rows: Tensor) -> Tensor:
        """``rows`` ``[B, K, H, D]``, 0 at fillers."""
        return rows if self.valid is None else torch.where(self.valid[:, :, None, None], rows, self._zero(rows.dtype))

    def without_fresh(self, full: Tensor) -> Tensor:
        """``full`` ``[B, S, H, D]``, 0 at valid slots."""
        return torch.where(self._fresh, self._zero(full.dtype), full)

    def _zero(self, dtype: torch.dtype) -> Tensor:
        """A zero on the device, cached to save a launch."""
        if dtype not in self._zeros:
            self._zeros[dtype] = torch.zeros((), dtype=dtype, device=self.index.device)
        return self._zeros[dtype]

    @cached_property
    def _fresh(self) -> Tensor:
        valid = torch.ones_like(self.index, dtype=torch.bool) if self.valid is None else self.valid
        none = torch.zeros(self.index.shape[0], self.length, dtype=torch.bool, device=self.index.device)
        return none.scatter(1, self.index, valid)[:, :, None, None]

    @cached_property
    def _zeros(self) -> dict[torch.dtype, Tensor]:
        return {}


class _MergeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, other: Tensor, kept: Tensor, others: Places, keeps: Places, merged: Tensor | None) -> Tensor:
        ctx.others, ctx.keeps = others, keeps
        if merged is not None:
            return merged.view_as(merged)
        return _merged(other, kept, others, keeps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.transpose(1, 2)
        other_grad = kept_grad = None
        if ctx.needs_input_grad[0]:
            other_grad = ctx.others.take(grad).transpose(1, 2)
        if ctx.needs_input_grad[1]:
            kept_grad = ctx.keeps.only_valid(ctx.keeps.take(grad)).transpose(1, 2)
        return other_grad, kept_grad, None, None, None


class _ReplaceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Tensor, kept: Tensor, keeps: Places) -> Tensor:
        ctx.keeps = keeps
        by_position = full.transpose(1, 2)
        replaced = torch.empty_like(by_position, memory_format=torch.contiguous_format).copy_(by_position)
        keeps.write(kept.transpose(1, 2), replaced)
        return replaced.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        keeps: Places = ctx.keeps
        grad = grad.transpose(1, 2)
        full_grad = kept_grad = None
        if ctx.needs_input_grad[0]:
            full_grad = keeps.without_fresh(grad).transpose(1, 2)
        if ctx.needs_input_grad[1]:
            kept_grad = keeps.only_valid(keeps.take(grad)).transpose(1, 2)
        return full_grad, kept_grad, None


class _StopGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, passes: Tensor) -> Tensor:
        ctx.save_for_backward(passes)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (passes,) = ctx.saved_tensors
        return grad.masked_fill(~passes.reshape(*passes.shape, *(1 for _ in grad.shape[2:])), 0), None


def merge_rows(other: Tensor, kept: Tensor, *, others: Places, keeps: Places, merged: Tensor | None = None) -> Tensor:
    """Merge two disjoint sets of rows that cover all positions, in order.

    Args:
        other: ``[B, H, M, D]``.
        kept: ``[B, H, K, D]``.
        others: Places of ``other``.
        keeps: Places of ``kept``; invalid slots get no gradient.
        merged: The result, if it is already available; then only its gradients are attached.

    Returns:
        ``[B, H, M + K, D]``, differentiable in ``other`` and ``kept``.
    """
    if torch.is_grad_enabled():
        return _MergeRows.apply(other, kept, others, keeps, merged)
    return _merged(other, kept, others, keeps) if merged is None else merged


def _merged(other: Tensor, kept: Tensor, others: Places, keeps: Places) -> Tensor:
    batch, heads, _, size = kept.shape
    full = kept.new_empty(batch, keeps.length, heads, size)
    others.write(other.transpose(1, 2), full)
    keeps.write(kept.transpose(1, 2), full)
    return full.transpose(1, 2)


def replace_rows(full: Tensor, kept: Tensor, *, keeps: Places) -> Tensor:
    """Full-length rows with the kept ones replaced.

    Args:
        full: ``[B, H, S, D]``.
        kept: ``[B, H, K, D]``; invalid slots hold the values of ``full``.
        keeps: Places of ``kept``. Gradients of valid slots go to ``kept``, all others to ``full``.

    Returns:
        ``[B, H, S, D]``.
    """
    return _ReplaceRows.apply(full, kept, keeps)


def stop_gradient(hidden: Tensor, *, passes: Tensor) -> Tensor:
    """``hidden`` ``[B, K, ...]`` itself, with gradients only at ``passes`` ``[B, K]``."""
    return _StopGradient.apply(hidden, passes)
