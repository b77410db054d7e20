"""Elementwise work of decoder layers as ops: kernels need one launch where models need many."""

from __future__ import annotations

from typing import Any

from torch import Tensor, cat
from torch.autograd import Function
from torch.nn.functional import silu

from cggr_core.backends import register_reference
from cggr_core.checks import first_derivatives_only

__all__ = ["rotary_in_place", "rotary_reference", "silu_mul_reference"]


def rotary_reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Plain-torch op ``rotary``: ``x cos + [-x2, x1] sin`` for queries and keys, with ``x = [x1, x2]`` in halves.

    Args:
        q: ``[B, H, S, D]``, ``D`` even, any float dtype.
        k: ``[B, Hkv, S, D]``.
        cos: ``[B, S, D]`` or ``[1, S, D]``.
        sin: As ``cos``.

    Returns:
        Both turned, in the shapes of ``q`` and ``k``. The method is https://arxiv.org/abs/2104.09864.
    """
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + _half_turn(q) * sin, k * cos + _half_turn(k) * sin


def _half_turn(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return cat((-second, first), dim=-1)


def rotary_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Of op ``rotary``, ``x cos + [-x2, x1] sin``, made in one new tensor: on a CPU, memory costs most.

    Args:
        x: ``[B, H, S, D]``, ``D`` even, in the dtype of the others.
        cos: ``[B, S, D]`` or ``[1, S, D]``, without a gradient.
        sin: As ``cos``.

    Returns:
        ``[B, H, S, D]``; it can be differentiated once.
    """
    return _Turn.apply(x, cos[:, None], sin[:, None])


class _Turn(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        turned = x * cos
        (first, second), (to_first, to_second), (sin_first, sin_second) = (
            part.chunk(2, dim=-1) for part in (x, turned, sin)
        )
        # Not addcmul, which rounds once where models round twice.
        to_first.sub_(second * sin_first)
        to_second.add_(first * sin_second)
        return turned

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        back = grad * cos
        (first, second), (to_first, to_second), (sin_first, sin_second) = (
            part.chunk(2, dim=-1) for part in (grad, back, sin)
        )
        to_first.add_(second * sin_second)
        to_second.sub_(first * sin_first)
        return back, None, None


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Plain-torch op ``silu_mul``: ``silu(gate) * up``, the middle of SwiGLU (https://arxiv.org/abs/2002.05202).

    Args:
        gate: Any shape and float dtype.
        up: Of the same shape.

    Returns:
        The product.
    """
    return silu(gate) * up


register_reference("rotary", rotary_reference)
register_reference("silu_mul", silu_mul_reference)
