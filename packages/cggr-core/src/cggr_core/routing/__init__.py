"""Engines that run kept tokens through a stock Hugging Face model; the one place that imports transformers."""

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "routing through a model needs transformers >= 5.17: python -m pip install 'cggr-core[transformers]'"
    ) from error

from cggr_core.routing.architectures import unwrapped
from cggr_core.routing.context_pass import NO_CONTEXT, Context
from cggr_core.routing.engine import Engine
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.patching import replaced_forwards, without_hooks
from cggr_core.routing.shared import Shared

__all__ = [
    "NO_CONTEXT",
    "Context",
    "Engine",
    "Shared",
    "TokenInputs",
    "replaced_forwards",
    "transformers",
    "unwrapped",
    "without_hooks",
]
