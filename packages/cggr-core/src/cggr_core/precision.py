"""Which dtype a head's matrix product runs in, and which one sums are accumulated in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "head_operands"]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 input (gradient checks), float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def head_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands of ``hidden @ weight.T + bias`` in the dtype the product runs in.

    Under autocast that is the autocast dtype (float64 is left alone, as autocast does); otherwise the operands must
    agree already.

    Raises:
        TypeError: If the dtypes differ and autocast is off.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} but weight is {weight.dtype}; cast one of them, or call under "
            f"torch.autocast({device_type!r}, ...)"
        )
    return hidden, weight, None if bias is None else bias.to(weight.dtype)
