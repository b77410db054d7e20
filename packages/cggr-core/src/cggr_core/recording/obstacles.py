"""Reasons not to record a step that do not depend on its model or arguments."""

from __future__ import annotations

import os
from typing import Any, cast

import torch

from cggr_core.monitor import capturing


def obstacle_of(router: Any) -> str | None:
    """Why steps with a router are not recorded; ``None`` if they can be.

    Args:
        router: What scores.
    """
    if not getattr(router, "recordable", False):
        name = type(getattr(router, "router", router)).__name__
        return f"the router is a {name}, which may run arbitrary code in a step"
    return None


def obstacle_now(device: torch.device) -> str | None:
    """Why no step can be recorded in the current state of the process; ``None`` if one can.

    Args:
        device: Of the step.
    """
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return "gradients are off"
    if capturing(device):
        return "the caller is capturing a graph"
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        return "several processes share the step, and their communication cannot be captured"
    if os.environ.get("CGGR_VERIFY"):
        return "CGGR_VERIFY compares passes on the host"
    torch_c = cast(Any, torch._C)
    if torch_c._len_torch_dispatch_stack() or torch_c._autograd._top_saved_tensors_default_hooks(True) is not None:
        return "a dispatch mode or saved-tensor hooks are active"
    return None
