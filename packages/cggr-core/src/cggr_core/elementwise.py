"""Elementwise work of decoder layers as ops: kernels need one launch where models need many."""

from __future__ import annotations

from torch import Tensor, cat
from torch.nn.functional import silu

from cggr_core.backends import register_reference

__all__ = ["rotary_reference", "silu_mul_reference"]


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
