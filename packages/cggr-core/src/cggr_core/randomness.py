"""Counter-based random numbers: a pure function of seed, draw and position.

The same seed and draw give the same numbers on every device, on every rank and after every restart, which no
``torch.Generator`` does across devices. The draw may be on the device (a 0-dim int64 tensor that a captured graph
increments), so the host reads nothing.

Source: the output function of SplitMix64 (Steele, Lea & Flood, *Fast splittable pseudorandom number generators*,
OOPSLA 2014), applied to a hashed key plus the position times the golden-ratio increment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["uniform"]


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
# Separates seeds from draws: (seed 1, draw 0) and (seed 0, draw 1) must not collide.
_SEED_STEP = 0xD1342543DE82EF95


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically; masking the copied sign bits off makes the shift logical.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(
    shape: Sequence[int],
    *,
    seed: int,
    draw: int | Tensor = 0,
    device: torch.device | str | None = None,
    offset: int | Tensor = 0,
    stride: int | None = None,
) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        shape: Shape of the result; the number at a flat position depends on that position alone.
        seed: Any Python int; its low 64 bits count.
        draw: Which draw of the seed: an int, or a 0-dim int64 tensor (never read by the host if it is
            on ``device``).
        device: Device of the result.
        offset: Position of the first number, an int or a 0-dim int64 tensor, so that one draw can be handed out in
            parts.
        stride: Positions from the start of one row (the last dimension) to that of the next; None for its length.
            With a fixed stride a row's numbers do not depend on how long the rows are.

    Returns:
        float64 of ``shape``: multiples of 2**-52 plus 2**-53, so neither 0 nor 1 occurs.

    Example:
        >>> bool((uniform((2, 3), seed=7) == uniform((2, 3), seed=7)).all())
        True
    """
    if isinstance(draw, Tensor):
        counter = draw.to(device=device, dtype=torch.int64, non_blocking=True)
    else:
        counter = torch.full((), draw, dtype=torch.int64, device=device)
    key = _mix(_mix(counter * _GOLDEN + _signed(seed * _SEED_STEP)) + _GOLDEN)
    length = math.prod(shape) if stride is None else shape[-1]
    position = torch.arange(length, dtype=torch.int64, device=device) + offset
    if stride is not None:
        position = position + torch.arange(math.prod(shape[:-1]), device=device)[:, None] * stride
    bits = _shift_right(_mix(position * _GOLDEN + key), 12)
    return ((bits.to(torch.float64) + 0.5) * 2.0**-52).reshape(tuple(shape))
