"""Training with CGGR: in the Hugging Face Trainer and other loops, and by the ``cggr`` command."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cggr_train.trainer import CGGRConfig, CGGRMixin, CGGRTrainer

try:
    __version__ = version("cggr-train")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.0.0"

__all__ = ["CGGRConfig", "CGGRMixin", "CGGRTrainer", "__version__"]


def __getattr__(name: str) -> Any:
    # The Trainer takes seconds to import, and the command needs none of it.
    if name in ("CGGRConfig", "CGGRMixin", "CGGRTrainer"):
        from cggr_train import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
