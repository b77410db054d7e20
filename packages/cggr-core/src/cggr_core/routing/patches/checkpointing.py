"""Gradient checkpointing, by transformers and by torch."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from cggr_core.routing.architectures import Architecture
from cggr_core.routing.patches.modules import replaced_forwards


@contextmanager
def without_checkpointing(architecture: Architecture) -> Iterator[None]:
    """Disable Hugging Face's own gradient checkpointing, which drops the cache that routing relies on.

    Scope: the modules of this model.
    """
    switched: list[Any] = [
        module for module in architecture.checkpointing if module.__dict__.get("gradient_checkpointing") is True
    ]
    try:
        for module in switched:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True


def uses_checkpointing(layer: nn.Module) -> bool:
    """Whether transformers was asked to recompute this layer in the backward pass."""
    return layer.training and layer.__dict__.get("gradient_checkpointing") is True


def recomputes_with_torch(module: nn.Module) -> bool:
    """Whether a module's gradient checkpointing is torch's non-reentrant one, the default of transformers."""
    checkpoints = module.__dict__.get("_gradient_checkpointing_func")
    return (
        isinstance(checkpoints, partial)
        and checkpoints.func is checkpoint
        and checkpoints.keywords.get("use_reentrant") is False
    )


@contextmanager
def without_random_states(architecture: Architecture) -> Iterator[None]:
    """Let checkpointed layers be recomputed without restoring the random state of their forward.

    Scope: the modules of this model for which :func:`recomputes_with_torch` is true.
    """
    switched: list[tuple[Any, Any]] = [
        (module, module.__dict__["_gradient_checkpointing_func"])
        for module in architecture.checkpointing
        if module.__dict__.get("gradient_checkpointing") is True and recomputes_with_torch(module)
    ]
    try:
        for module, keeps in switched:
            module._gradient_checkpointing_func = partial(keeps, preserve_rng_state=False)
        yield
    finally:
        for module, keeps in switched:
            module._gradient_checkpointing_func = keeps


def without_checkpoint_wrappers(architecture: Architecture) -> AbstractContextManager[None]:
    """Bypass torch's own checkpoint wrappers.

    Scope: the wrappers of this model.
    """
    return replaced_forwards(architecture.checkpoint_wrappers) if architecture.checkpoint_wrappers else nullcontext()
