"""The parts of TRL that are overridden, checked before training starts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

TESTED = "TRL 1.16"


@contextmanager
def overridden(trainer: Any, **methods: Any) -> Iterator[None]:
    """Replace methods of a trainer inside the block."""
    before = {name: vars(trainer)[name] for name in methods if name in vars(trainer)}
    try:
        vars(trainer).update(methods)
        yield
    finally:
        for name in methods:
            vars(trainer).pop(name, None)
        vars(trainer).update(before)


@contextmanager
def uncached_autocast() -> Iterator[None]:
    """Disable autocast's weight cache, which would reuse weights cast under ``no_grad`` where gradients are on."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def check_fused_head(trainer: Any, model: Any) -> None:
    """Raise unless TRL has patched the model's forward to return per-token log-probabilities.

    Args:
        trainer: The trainer, for its name.
        model: The model, inside its PEFT wrapper.

    Raises:
        RuntimeError: Saying what was found, and which versions work.
    """
    parameters = inspect.signature(getattr(model.forward, "__func__", model.forward), follow_wrapped=False).parameters
    missing = {"fused_lm_head", "shift_labels"} - parameters.keys()
    if missing:
        raise _unknown(trainer, f"a forward of {type(model).__name__} without {' and '.join(sorted(missing))}")


def check_methods(trainer: Any, names: dict[str, tuple[str, ...]]) -> None:
    """Raise unless the trainer has the methods that are called or overridden, with the arguments that they are given.

    Args:
        trainer: The trainer.
        names: Names of methods, with the arguments that each must have.

    Raises:
        RuntimeError: Saying what was found, and which versions work.
    """
    for name, arguments in names.items():
        method = getattr(trainer, name, None)
        if not callable(method):
            raise _unknown(trainer, f"no method {name}")
        missing = set(arguments) - inspect.signature(method).parameters.keys()
        if missing:
            raise _unknown(trainer, f"a method {name} without {', '.join(sorted(missing))}")


def _unknown(trainer: Any, found: str) -> RuntimeError:
    kind = next(base.__name__ for base in type(trainer).__mro__ if base.__module__.split(".")[0] == "trl")
    return RuntimeError(
        f"{kind} of TRL {version('trl')} has {found}, through which CGGR routes its loss; {TESTED} works: "
        "python -m pip install 'trl>=1.16,<1.17'"
    )
