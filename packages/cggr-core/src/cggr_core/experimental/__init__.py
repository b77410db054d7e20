"""Experimental routers that have not paid off so far; they may change or be removed in any release.

Training with either was statistically indistinguishable from training on random tokens; see their guides.
"""

from cggr_core.experimental.learned_router import LearnedRouter
from cggr_core.experimental.remembered_scores import RememberedScores

__all__ = ["LearnedRouter", "RememberedScores"]
