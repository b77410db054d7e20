"""The backend that cggr-core finds through the entry point ``cggr.backends``."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

OPS: tuple[str, ...] = (
    "difficulty",
    "linear_difficulty",
    "linear_cross_entropy",
    "select",
    "routed_attention",
    "moe_route",
    "moe_experts",
    "rotary",
    "silu_mul",
    "quantize_rows",
    "quantize_silu_mul",
)
"""Names of the ops; each is a function in the module of the same name."""


def unavailable() -> str | None:
    """Why the kernels cannot run with the installed software, or ``None`` if they can.

    Whether a GPU is present does not matter here: an op is chosen by the device of its tensors.

    Returns:
        The reason, without a full stop, or ``None``.

    Example:
        >>> unavailable() is None or isinstance(unavailable(), str)
        True
    """
    without_cuda = f"this PyTorch ({torch.__version__}) is built without CUDA"
    if torch.version.hip is not None:
        return f"this PyTorch is built for ROCm ({torch.version.hip}), and the kernels are written for CUDA"
    # Triton takes a third of a second to import, which a PyTorch without CUDA would spend for nothing.
    if torch.version.cuda is None and not os.environ.get("TRITON_INTERPRET"):
        return without_cuda
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return (
            f"triton cannot be imported ({error}); install it: python -m pip install 'triton>=3.6' (on Windows "
            "'triton-windows>=3.6')"
        )
    from cggr_kernels._library import INTERPRETED

    if torch.version.cuda is None and not INTERPRETED:
        return without_cuda
    return None


def _collect() -> dict[tuple[str, str], Callable[..., Any]]:
    from cggr_kernels._library import DEVICE_TYPES

    functions = {op: getattr(importlib.import_module(f"cggr_kernels.{op}"), op) for op in OPS}
    return {(op, device_type): function for op, function in functions.items() for device_type in DEVICE_TYPES}


REASON: str | None = unavailable()
"""Why :data:`BACKEND` is empty, or ``None``."""

BACKEND: Mapping[tuple[str, str], Callable[..., Any]] = {} if REASON else _collect()
"""``(op, device type)`` to callable; empty where the kernels cannot run."""
