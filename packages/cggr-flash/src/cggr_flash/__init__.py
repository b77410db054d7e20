"""Load transformers models with the fastest attention backend that works."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cggr_flash.capabilities import AttentionBackend, attention_backends

if TYPE_CHECKING:
    from cggr_flash.enabling import enable_flash_attention
    from cggr_flash.loading import load_model_with_flash_attention

__version__: str = version("cggr-flash")

__all__ = [
    "AttentionBackend",
    "attention_backends",
    "enable_flash_attention",
    "load_model_with_flash_attention",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Imported on first use: transformers' model code takes seconds to import, and the table of backends does not need
    # it.
    if name == "enable_flash_attention":
        from cggr_flash.enabling import enable_flash_attention

        return enable_flash_attention
    if name == "load_model_with_flash_attention":
        from cggr_flash.loading import load_model_with_flash_attention

        return load_model_with_flash_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
