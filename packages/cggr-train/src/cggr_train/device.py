"""The device and precision of a run."""

from __future__ import annotations

import torch

from cggr_train.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the machine's accelerator, else the CPU.

    Raises:
        InputError: If torch knows no such device or cannot use it here.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to run under bfloat16 autocast; ``auto`` does so on accelerators only."""
    return precision == "bfloat16" or (precision == "auto" and device.type != "cpu")
