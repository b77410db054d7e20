"""Training with CGGR: the ``cggr`` command, its training loop, checkpoints, demo and reports."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("cggr-train")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.0.0"

__all__ = ["__version__"]
