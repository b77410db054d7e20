"""Confidence-Gated Gradient Routing: score every token, keep the ones worth learning from, train on those alone.

Pure torch. transformers is needed only by what runs a Hugging Face model (:class:`CGGRModel` and the routers), and is
imported when they are first used.
"""

from importlib.metadata import version

from cggr_core.learned_router import LearnedRouter
from cggr_core.linear_loss import linear_cross_entropy
from cggr_core.loss import CGGRLinearLoss, CGGRLoss, loss_coefficients
from cggr_core.model import CGGRModel
from cggr_core.remembered import RememberedScores
from cggr_core.router import TruncatedRouter, create_truncated_router
from cggr_core.schedule import Schedule
from cggr_core.scorer import CGGRScorer
from cggr_core.scoring import TokenStatistics, linear_token_statistics, score, token_statistics
from cggr_core.selection import Selection, select

__version__ = version("cggr-core")

__all__ = [
    "CGGRLinearLoss",
    "CGGRLoss",
    "CGGRModel",
    "CGGRScorer",
    "LearnedRouter",
    "RememberedScores",
    "Schedule",
    "Selection",
    "TokenStatistics",
    "TruncatedRouter",
    "__version__",
    "create_truncated_router",
    "linear_cross_entropy",
    "linear_token_statistics",
    "loss_coefficients",
    "score",
    "select",
    "token_statistics",
]
