"""Loading transformers models with the best attention backend of the machine."""

from importlib.metadata import version

__version__: str = version("cggr-flash")

__all__ = ["__version__"]
