"""The operator library on which every kernel is registered, and the devices it runs on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton

LIBRARY = torch.library.Library("cggr_kernels", "DEF")

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether ``TRITON_INTERPRET=1`` is set: kernels then run in Python, on CPU tensors too."""

DEVICE_TYPES: tuple[str, ...] = ("cuda", "cpu") if INTERPRETED else ("cuda",)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory available to a program; 0 if there is none, as in the interpreter."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin if device.type == "cuda" else 0


def register(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define one operator, its kernel and the shapes it returns.

    Args:
        schema: Operator schema, for example ``"difficulty(Tensor logits, int ignore_index) -> Tensor"``.
        launch: Implementation for real tensors.
        fake: Implementation for tensors without data, used in tracing.

    Returns:
        The operator, callable with the arguments of the schema.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    for device_type in DEVICE_TYPES:
        LIBRARY.impl(name, launch, device_type.upper())
    torch.library.register_fake(f"cggr_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.cggr_kernels, name).default
