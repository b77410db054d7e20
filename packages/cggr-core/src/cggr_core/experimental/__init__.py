"""Routers that were tried and did not pay: kept for whoever wants to try further, and free to change in any release.

Measured against scoring with the first layers, or at full depth, neither learned better at equal cost; the pages
"Learned router" and "Remembered scores" of the documentation say by how much.
"""

from cggr_core.experimental.learned_router import LearnedRouter
from cggr_core.experimental.remembered_scores import RememberedScores

__all__ = ["LearnedRouter", "RememberedScores"]
