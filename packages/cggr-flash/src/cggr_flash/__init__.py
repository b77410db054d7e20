"""Loading transformers models with the best attention backend of the machine."""

from importlib.metadata import version

from cggr_flash.capabilities import AttentionBackend, attention_backends
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
