"""A language model's head: its checks, the dtype its product runs in, and its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cggr_core.checks import check_float, check_same_device, check_shape

__all__ = [
    "accumulation_dtype",
    "bounded_logits",
    "check_head",
    "has_flat_rows",
    "head_logits",
    "head_operands",
    "product_dtype",
]


# The device type without autocast. A constant, since torch 2.11 cannot compile a query for it.
_WITHOUT_AUTOCAST = "meta"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input (gradient checks), float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_active(device_type: str) -> bool:
    """Whether autocast is on for a device type; false, not an error, for those (meta) that have none."""
    return device_type != _WITHOUT_AUTOCAST and torch.is_autocast_enabled(device_type)


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Dtype that ``hidden @ weight.T`` runs in.

    Under autocast that is the autocast dtype (float64 is left alone, as autocast does); otherwise the operands must
    agree already.

    Raises:
        TypeError: If the dtypes differ and autocast is off.
    """
    device_type = hidden.device.type
    if autocast_active(device_type) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} but weight is {weight.dtype}; cast one of them, or call under "
            f"torch.autocast({device_type!r}, ...)"
        )
    return hidden.dtype


def head_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of ``hidden @ weight.T + bias`` in :func:`product_dtype`."""
    dtype = product_dtype(hidden, weight)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float | None) -> None:
    """Raise unless ``hidden`` [..., H], ``weight`` [V, H] and ``bias`` [V] belong together."""
    check_float("hidden", hidden)
    check_float("weight", weight)
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, H] with the H of hidden [..., H], got weight {tuple(weight.shape)} and hidden "
            f"{tuple(hidden.shape)}"
        )
    check_same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        check_shape("bias", check_float("bias", bias), (weight.shape[0],), "one per row of weight")
        check_same_device("bias", bias, "hidden", hidden)
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0, or None, got {value!r}")


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
    out: Tensor | None = None,
) -> Tensor:
    """``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``, in place in ``out`` where it is given."""
    x = torch.mm(hidden, weight.t(), out=out)
    if bias is not None:
        x.add_(bias)
    return bounded_logits(x, softcap, scale)


def bounded_logits(x: Tensor, softcap: float | None, scale: float | None) -> Tensor:
    """``softcap * tanh(scale * x / softcap)``, in place."""
    if scale is not None and scale != 1.0:
        x.mul_(scale)
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)
    return x


def has_flat_rows(tensor: Tensor) -> bool:
    """Whether ``tensor`` [..., V] can be viewed as [N, V]; one that was sliced along the sequence cannot."""
    strides, shape = tensor.stride(), tensor.shape
    return all(strides[i] == strides[i + 1] * shape[i + 1] for i in range(tensor.dim() - 2))
