"""A language model's head applied to a chunk of rows at a time, and the gradients of its operands.

Shared by the losses and log-probabilities through a head: logits only exist for one chunk at a time, in the forward
pass and again in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_core.head import accumulation_dtype, autocast_active, head_logits

__all__ = ["HeadChunks", "HeadGradients", "row_chunks", "scatter_rows", "without_autocast"]

# Logits of a chunk, in elements. On CPU: large enough for a fast product, small enough for the last-level cache.
_CHUNK = 2**25
_CPU_CHUNK = 2**21


def row_chunks(rows: int, hidden: Tensor, vocab_size: int) -> list[slice]:
    """The chunks of ``rows`` rows whose logits are held at once."""
    small = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
    size = max(1, min(rows, (_CPU_CHUNK if small else _CHUNK) // vocab_size))
    return [slice(start, start + size) for start in range(0, rows, size)]


class HeadChunks:
    """The losses of a chunk of rows and the gradients of their weighted sum."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_index: Tensor | None,
        softcap: float | None,
        scale: float | None,
        product_dtype: torch.dtype,
    ) -> None:
        # Cast here and not in the graph: the gradient of a float32 weight stays float32 under autocast.
        self.hidden, self.weight = hidden.to(product_dtype), weight.to(product_dtype)
        self.bias = None if bias is None else bias.to(product_dtype)
        self.targets = targets.clamp(0, weight.shape[0] - 1)
        self.row_index, self.softcap, self.scale = row_index, softcap, scale
        self.dtype = accumulation_dtype(product_dtype)

    def rows(self, chunk: slice, dead: Tensor) -> Tensor:
        """Hidden rows of a chunk, zeroed where dead, so that their gradients are 0 whatever they hold."""
        rows = self.hidden[chunk] if self.row_index is None else self.hidden[self.row_index[chunk]]
        return rows.masked_fill(dead[:, None], 0.0)

    def losses(self, rows: Tensor, chunk: slice) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Loss [n], exp of the shifted logits [n, V], its sums [n], and the slope of the softcap [n, V]."""
        x = head_logits(rows, self.weight, self.bias, None, None).to(self.dtype)
        if self.scale is not None:
            x = x.mul_(self.scale)
        slope = None
        if self.softcap is not None:
            x = x.div_(self.softcap).tanh_()
            slope = 1.0 - x.square()
            x = x.mul_(self.softcap)
        x = x.sub_(x.amax(1, keepdim=True))
        shifted_y = x.gather(1, self.targets[chunk, None])[:, 0]
        e = x.exp_()
        sums = e.sum(1)
        return (sums.log() - shifted_y).clamp_(min=0.0), e, sums, slope

    def logit_gradients(
        self, e: Tensor, sums: Tensor, slope: Tensor | None, coefficient: Tensor, chunk: slice
    ) -> Tensor:
        """Gradient [n, V] of the weighted losses with respect to the head's output before scale and softcap."""
        if self.scale is not None:
            coefficient = coefficient * self.scale
        grad = e.mul_((coefficient / sums)[:, None])
        grad.scatter_add_(1, self.targets[chunk, None], -coefficient[:, None])
        if slope is not None:
            grad.mul_(slope)
        return grad


class HeadGradients:
    """Gradients of the three operands, accumulated over chunks; only the requested ones exist."""

    def __init__(self, head: HeadChunks, rows: int, needs: tuple[bool, bool, bool]) -> None:
        like, weight = head.hidden, head.weight
        # Gradients are computed before the loss scale is applied: float16 would flush the small ones to 0.
        self._widened = head.dtype if like.dtype == torch.float16 else None
        self.hidden = like.new_empty(rows, like.shape[1], dtype=self._widened) if needs[0] else None
        self.weight = torch.zeros_like(weight, dtype=head.dtype) if needs[1] else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=head.dtype) if needs[2] and head.bias is not None else None

    def add(self, grad: Tensor, rows: Tensor, weight: Tensor, chunk: slice) -> None:
        """Add what a chunk's gradient of the head's output ``[n, V]`` gives."""
        if self.bias is not None:
            self.bias.add_(grad.sum(0))
        if self._widened is None:
            grad = grad.to(rows.dtype)
        else:
            rows, weight = rows.to(self._widened), weight.to(self._widened)
        if self.hidden is not None:
            self.hidden[chunk] = torch.mm(grad, weight)
        if self.weight is not None:
            if self.weight.dtype == grad.dtype:
                # Not addmm_: torch's flop counter does not know it.
                torch.addmm(self.weight, grad.t(), rows, out=self.weight)
            else:
                self.weight.add_(torch.mm(grad.t(), rows))


def scatter_rows(grad: Tensor, row_index: Tensor | None, rows: int) -> Tensor:
    """Gradient ``[rows, H]`` of all rows from that of the rows ``row_index`` (``None``: it is that of all rows)."""
    if row_index is None:
        return grad
    return grad.new_zeros(rows, grad.shape[1]).index_add_(0, row_index, grad)


def without_autocast(function: type[torch.autograd.Function], hidden: Tensor, *arguments: Any) -> Any:
    """Apply an autograd function that casts its operands itself."""
    # The function casts its operands; autocast must not cast its accumulators too.
    if not autocast_active(hidden.device.type):
        return function.apply(hidden, *arguments)
    with torch.autocast(hidden.device.type, enabled=False):
        return function.apply(hidden, *arguments)
