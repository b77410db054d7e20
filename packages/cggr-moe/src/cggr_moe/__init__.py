"""Token-routed MLP layers."""

from importlib.metadata import version

__version__: str = version("cggr-moe")

__all__ = ["__version__"]
