"""The registry of op implementations.

Every op has a plain-torch reference, registered by the module that defines it. Other distributions offer faster
implementations through the entry point group ``cggr.backends``: each entry point loads a mapping
``{(op, device type): callable}`` with the positional signature of the reference. They are loaded once, when this
module is imported. A failure to load, or the ``REASON`` that the module of an empty mapping gives, becomes the reason
shown by :func:`report`.

The environment variable ``CGGR_BACKEND``, read at import, says what is wanted:

* ``auto`` (default): the fastest that exists, else the reference, which is logged once;
* ``torch``: the references;
* ``triton``: the Triton kernels; an op that they do not have raises with the reason.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib import metadata
from typing import Any, NamedTuple

import torch

from cggr_core.checks import check_choice

__all__ = ["BackendRow", "has_fp8_products", "register_reference", "report", "resolve"]

_GROUP = "cggr.backends"
_CHOICES = ("auto", "torch", "triton")
_REFERENCE = "torch"
_logger = logging.getLogger(__name__)


class BackendRow(NamedTuple):
    """One line of :func:`report`: what ``op`` runs on tensors of ``device_type``, and why."""

    op: str
    device_type: str
    backend: str
    reason: str


class _UnavailableError(Exception):
    """Raised for an installed backend that has no kernels to offer here; the message gives the reason."""


class _Registry:
    """References, kernels and the requested backend. One per process; tests create their own."""

    def __init__(self, wanted: str, sources: Mapping[str, Callable[[], Mapping[tuple[str, str], Any]]]) -> None:
        self.wanted = check_choice("CGGR_BACKEND", wanted, _CHOICES)
        self.references: dict[str, Callable[..., Any]] = {}
        self.kernels: dict[tuple[str, str], tuple[str, Callable[..., Any]]] = {}
        self.failures: dict[str, str] = {}
        self._logged: set[tuple[str, str]] = set()
        for name, load in sources.items() if wanted != _REFERENCE else ():
            try:
                offered = load()
            except Exception as error:  # a broken plug-in must not break the library, whatever it raises
                expected = isinstance(error, _UnavailableError)
                self.failures[name] = str(error) if expected else f"{type(error).__name__}: {error}"
                continue
            for key, function in offered.items():
                self.kernels.setdefault(key, (name, function))

    def missing_reason(self, op: str, device_type: str) -> str:
        if self.wanted == _REFERENCE:
            return "CGGR_BACKEND=torch"
        if self.failures:
            return "; ".join(f"backend {name!r} is not available: {why}" for name, why in self.failures.items())
        if not self.kernels:
            return (
                "no kernel package is installed (python -m pip install ./packages/cggr-kernels in a checkout, or the "
                "wheel of cggr-kernels)"
            )
        return f"no installed backend has {op!r} for device type {device_type!r}"

    def resolve(self, op: str, device_type: str) -> Callable[..., Any]:
        kernel = self.kernels.get((op, device_type))
        if kernel is not None:
            return kernel[1]
        reference = self.references.get(op)
        if reference is None:
            raise ValueError(f"no implementation of op {op!r}; registered are {sorted(self.references)}")
        if self.wanted == "triton":
            raise RuntimeError(
                f"CGGR_BACKEND=triton, but {op!r} on {device_type!r} has no Triton kernel: "
                f"{self.missing_reason(op, device_type)}. Use CGGR_BACKEND=auto to fall back to torch"
            )
        if not torch.compiler.is_compiling() and (op, device_type) not in self._logged:
            self._logged.add((op, device_type))
            _logger.info("%s on %s runs in torch: %s", op, device_type, self.missing_reason(op, device_type))
        return reference

    def report(self) -> list[BackendRow]:
        device_types = {"cpu"} | {device_type for _, device_type in self.kernels}
        ops = set(self.references) | {op for op, _ in self.kernels}
        rows = []
        for op in sorted(ops):
            for device_type in sorted(device_types):
                kernel = self.kernels.get((op, device_type))
                if kernel is not None:
                    rows.append(BackendRow(op, device_type, kernel[0], "kernel found"))
                elif self.wanted == "triton" or op not in self.references:
                    rows.append(BackendRow(op, device_type, "none", self.missing_reason(op, device_type)))
                else:
                    rows.append(BackendRow(op, device_type, _REFERENCE, self.missing_reason(op, device_type)))
        return rows


def _installed_sources() -> dict[str, Callable[[], Mapping[tuple[str, str], Any]]]:
    return {entry.name: partial(_load, entry) for entry in metadata.entry_points(group=_GROUP)}


def _load(entry: metadata.EntryPoint) -> Mapping[tuple[str, str], Any]:
    offered = entry.load()
    if not offered:
        reason = getattr(importlib.import_module(entry.module), "REASON", None)
        raise _UnavailableError(reason or "it has no kernel for this machine")
    return offered


_registry = _Registry(os.environ.get("CGGR_BACKEND", "auto"), _installed_sources())


def register_reference(op: str, function: Callable[..., Any]) -> None:
    """Make ``function`` the plain-torch implementation of ``op``.

    Args:
        op: Name of the op.
        function: Callable with the op's positional signature, for tensors of any device.

    Example:
        >>> register_reference("double", lambda x: x * 2)
        >>> resolve("double", "cpu")(3)
        6
    """
    _registry.references[op] = function


def resolve(op: str, device_type: str, dtype: torch.dtype | None = None) -> Callable[..., Any]:
    """The implementation of ``op`` for tensors on ``device_type``.

    Args:
        op: Name of the op, such as ``"difficulty"``.
        device_type: ``tensor.device.type``.
        dtype: Dtype of the op's main operand, if it matters: float64 always runs the reference (kernels accumulate
            in float32).

    Returns:
        A callable with the positional signature of the op's reference.

    Raises:
        RuntimeError: If ``CGGR_BACKEND=triton`` and there is no such kernel; the text says why.
        ValueError: If no implementation of ``op`` exists.

    Example:
        >>> import cggr_core.strategies
        >>> callable(resolve("select", "cpu"))
        True
    """
    if dtype == torch.float64 and op in _registry.references:
        return _registry.references[op]
    return _registry.resolve(op, device_type)


def report() -> list[BackendRow]:
    """What runs where, and why: one row per op and device type.

    Returns:
        Rows ``(op, device_type, backend, reason)`` for the CPU and every device type that a backend offers.

    Example:
        >>> all(row.reason for row in report())
        True
    """
    return _registry.report()


@cache
def has_fp8_products(device: torch.device) -> bool:
    """Whether a device multiplies in FP8 with a scale for every row: NVIDIA's from compute capability 9.0 on.

    Example:
        >>> has_fp8_products(torch.device("cpu"))
        False
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
