"""The operator library that every kernel is registered on, and the devices it runs on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

LIBRARY = torch.library.Library("cggr_kernels", "DEF")

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""Whether ``TRITON_INTERPRET=1`` was set: kernels then run in Python, on CPU tensors too, and nothing is autotuned."""

DEVICE_TYPES: tuple[str, ...] = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def register(schema: str, launch: Callable, fake: Callable) -> Callable:
    """Define one operator, its kernel and the shapes it returns.

    Args:
        schema: Operator schema, for example ``"difficulty(Tensor logits, int ignore_index) -> Tensor"``.
        launch: Implementation on real tensors.
        fake: Implementation on tensors without data, for tracing.

    Returns:
        The operator, callable with the arguments of the schema.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    for device_type in DEVICE_TYPES:
        LIBRARY.impl(name, launch, device_type.upper())
    torch.library.register_fake(f"cggr_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.cggr_kernels, name).default


def autotuned(configs: list[triton.Config], key: list[str], **options: object) -> Callable:
    """``triton.autotune`` for at most eight configurations, or the first of them where the interpreter runs.

    Args:
        configs: Candidates, the safest (least shared memory) first; at most eight.
        key: Names of kernel arguments; a new value tunes again, so they must repeat from step to step.
        **options: Passed on to ``triton.autotune``.

    Returns:
        A decorator for a ``triton.jit`` function.

    Raises:
        ValueError: If there are no candidates or more than eight.
    """
    if not 1 <= len(configs) <= 8:
        raise ValueError(f"configs must hold 1 to 8 candidates, got {len(configs)}")
    return triton.autotune(configs[:1] if INTERPRETED else configs, key=key, cache_results=not INTERPRETED, **options)
