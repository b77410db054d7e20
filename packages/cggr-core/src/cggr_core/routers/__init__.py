"""Routers: the model itself at full depth, its first layers, or any callable."""

from cggr_core.routers.adapters import FullDepthRouter, OwnLayersRouter, TimedRouter, as_router
from cggr_core.routers.truncated import TruncatedRouter, create_truncated_router, router_statistics

__all__ = [
    "FullDepthRouter",
    "OwnLayersRouter",
    "TimedRouter",
    "TruncatedRouter",
    "as_router",
    "create_truncated_router",
    "router_statistics",
]
