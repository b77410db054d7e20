"""The operands of ops on a language-model head: their checks, and the dtype of their product."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_kernels._checks import check_float, check_vocabulary


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, softcap: float | None, scale: float | None
) -> None:
    """Raise unless a head can be applied to hidden states.

    Args:
        hidden: Shape ``[N, H]``, float32, float16 or bfloat16.
        weight: Shape ``[V, H]``, float32, float16 or bfloat16.
        bias: Shape ``[V]``.
        softcap: Positive, or ``None``.
        scale: Positive, or ``None``.

    Raises:
        TypeError: If a dtype is not accepted.
        ValueError: If shapes do not match, or a number is out of range.
    """
    check_float("hidden", hidden, 2)
    check_float("weight", weight, 2)
    H = hidden.shape[1]
    if weight.shape[1] != H:
        raise ValueError(f"weight must be [V, {H}] for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}")
    check_vocabulary("weight", weight.shape[0])
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be a positive number or None, got {value}")


def in_product_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in the dtype of the head's product, which is autocast's if that is on.

    Args:
        hidden: Shape ``[N, H]``.
        weight: Shape ``[V, H]``.
        bias: Shape ``[V]``; cast to the dtype of ``hidden`` in any case.

    Returns:
        ``hidden``, ``weight`` and ``bias``, all of one dtype.

    Raises:
        TypeError: If ``hidden`` and ``weight`` differ in dtype without autocast.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"weight must have the dtype of hidden, got {weight.dtype} and {hidden.dtype}; cast one of them"
        )
    return hidden, weight, None if bias is None else bias.to(hidden.dtype)
