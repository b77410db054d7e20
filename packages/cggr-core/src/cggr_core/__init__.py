"""Confidence-Gated Gradient Routing: score every token, keep the ones worth learning from, train on those alone.

Pure torch. transformers is needed only by what runs a Hugging Face model (:class:`CGGRModel` and the routers), and is
imported when they are first used.
"""

from importlib.metadata import version

from cggr_core.coefficients import loss_coefficients
from cggr_core.linear_loss import linear_cross_entropy
from cggr_core.logprobs import (
    RoutedHidden,
    SharedContext,
    TokenLogprobs,
    keep_nonzero,
    keep_random,
    keep_tokens,
    keep_top_entropy,
    routed_hidden,
    routed_logprobs,
)
from cggr_core.loss import CGGRLinearLoss, CGGRLoss
from cggr_core.model import CGGRModel
from cggr_core.routers import TruncatedRouter, create_truncated_router
from cggr_core.schedule import Schedule
from cggr_core.scorer import CGGRScorer
from cggr_core.scoring import score
from cggr_core.selection import Selection
from cggr_core.statistics import TokenStatistics, linear_token_statistics, token_statistics
from cggr_core.strategies import select

__version__ = version("cggr-core")

__all__ = [
    "CGGRModel",
    "CGGRLoss",
    "CGGRLinearLoss",
    "CGGRScorer",
    "create_truncated_router",
    "TruncatedRouter",
    "Schedule",
    "Selection",
    "select",
    "score",
    "token_statistics",
    "linear_token_statistics",
    "TokenStatistics",
    "linear_cross_entropy",
    "loss_coefficients",
    "routed_logprobs",
    "routed_hidden",
    "TokenLogprobs",
    "RoutedHidden",
    "SharedContext",
    "keep_tokens",
    "keep_top_entropy",
    "keep_random",
    "keep_nonzero",
    "__version__",
]
