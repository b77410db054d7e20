"""Whether a module's call is wrapped, by anything or by torch's own gathering of weights."""

from typing import Any

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether anything wraps a module's call, besides gathering its weights (FSDP2)."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(not is_of_distributed(hook) for registered in hooks for hook in registered.values())


def is_of_distributed(hook: Any) -> bool:
    """Whether a hook is one of torch's own, which gather a module's weights."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
