"""Routers that were tried and have not paid so far; they may change or go in any release.

Training with either was statistically indistinguishable from training on random tokens; see their guides.
"""

from cggr_core.experimental.learned_router import LearnedRouter
from cggr_core.experimental.remembered_scores import RememberedScores

__all__ = ["LearnedRouter", "RememberedScores"]
