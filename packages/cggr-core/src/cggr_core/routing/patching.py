"""Changes to a model that last for one pass and are undone whatever happens."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from cggr_core.routing.architectures import Architecture


@contextmanager
def replaced_forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules another ``forward`` for the length of the block.

    The instance attribute is set, not the class: ``module(...)`` still runs its hooks (those of FSDP2, for one)
    around the replacement.
    """
    before = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Call a module inside its own call: its forward hooks have run around the outer one, once."""
    before = {name: module.__dict__[name] for name in ("_forward_pre_hooks", "_forward_hooks")}
    try:
        module.__dict__.update({name: OrderedDict() for name in before})
        yield
    finally:
        module.__dict__.update(before)


@contextmanager
def without_checkpointing(architecture: Architecture) -> Iterator[None]:
    """Switch Hugging Face's own gradient checkpointing off: it drops the cache, through which routing works."""
    switched: list[Any] = [
        module for module in architecture.checkpointing if module.__dict__.get("gradient_checkpointing") is True
    ]
    try:
        for module in switched:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True


def uses_checkpointing(layer: nn.Module) -> bool:
    """Whether transformers was asked to recompute this layer in the backward pass."""
    return layer.training and layer.__dict__.get("gradient_checkpointing") is True


@contextmanager
def attention_implementation(architecture: Architecture, choose: Callable[[str], str]) -> Iterator[None]:
    """Run every (sub)config of the model on another attention implementation for the length of the block."""
    configs: dict[int, Any] = {id(module.config): module.config for module in architecture.configured}
    before = {
        key: config._attn_implementation for key, config in configs.items() if hasattr(config, "_attn_implementation")
    }
    try:
        for key, name in before.items():
            # The internal attribute: the public setter walks over sub-configs and may refuse.
            configs[key]._attn_implementation_internal = choose(name)
        yield
    finally:
        for key, name in before.items():
            configs[key]._attn_implementation_internal = name
