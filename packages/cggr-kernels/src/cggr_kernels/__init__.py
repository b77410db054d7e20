"""Triton kernels for token-selective training: scoring, losses, selection, attention of kept tokens, routed MLPs.

The package imports wherever PyTorch does. :data:`BACKEND` maps ``(op, device type)`` to the callables that run there;
where the kernels cannot run, it is empty and :data:`REASON` says why. ``python -m cggr_kernels`` prints both.
"""

from importlib.metadata import version

from cggr_kernels.backend import BACKEND, REASON

__version__: str = version("cggr-kernels")

__all__ = ["BACKEND", "REASON", "__version__"]
