"""Confidence-gated gradient routing: train a transformer on the tokens worth learning from.

This package re-exports the public names of ``cggr_core``. Names of the optional packages are imported on first use; if
the package is missing, the error says how to install it.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from cggr_core import (
    CGGRLinearLoss,
    CGGRLoss,
    CGGRModel,
    CGGRScorer,
    RoutedHidden,
    Selection,
    SharedContext,
    TokenLogprobs,
    create_truncated_router,
    keep_nonzero,
    keep_random,
    keep_tokens,
    keep_top_entropy,
    routed_hidden,
    routed_logprobs,
)

__version__: str = version("cggr")

__all__ = [
    "CGGRLinearLoss",
    "CGGRLoss",
    "CGGRModel",
    "CGGRScorer",
    "RoutedHidden",
    "Selection",
    "SharedContext",
    "TokenLogprobs",
    "__version__",
    "create_truncated_router",
    "keep_nonzero",
    "keep_random",
    "keep_tokens",
    "keep_top_entropy",
    "routed_hidden",
    "routed_logprobs",
]

# name -> the module that has it
_OPTIONAL: dict[str, str] = {
    "PersistentTRMLP": "cggr_moe",
    "create_persistent_tr_mlp": "cggr_moe",
    "enable_flash_attention": "cggr_flash",
    "load_model_with_flash_attention": "cggr_flash",
    "register_experts": "cggr_moe",
}


def __getattr__(name: str) -> Any:  # typed as object, no name would be callable for a type checker
    if name not in _OPTIONAL:
        raise AttributeError(f"module 'cggr' has no attribute {name!r}")
    module = _OPTIONAL[name]
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module:  # the package is installed; something it needs is not
            raise
        # An ImportError, because `from cggr import name` would replace the message of an AttributeError.
        package = module.replace("_", "-")
        raise ImportError(
            f"cggr.{name} comes from the package {package}, which is not installed: python -m pip install "
            f"./packages/{package} in a checkout of this project, or install its wheel ({module}-*.whl)"
        ) from error
