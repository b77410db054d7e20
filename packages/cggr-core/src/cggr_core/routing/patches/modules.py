"""Forwards, parameters and hooks of modules."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def replaced_forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the ``forward`` of modules within the block.

    The instance attribute is set, not the class: ``module(...)`` still runs its hooks (those of FSDP2, for one)
    around the replacement.

    Scope: these modules, whoever calls them.
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
def replaced_parameters(model: nn.Module, replacements: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Replace parameters of modules within the block.

    Scope: the modules of this model, whoever calls them.

    Args:
        model: The model.
        replacements: The new parameter for each current one, shared ones included.
    """
    before = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in replacements
    ]
    try:
        for parameters, name, parameter in before:
            parameters[name] = replacements[parameter]
        yield
    finally:
        for parameters, name, parameter in before:
            parameters[name] = parameter


@contextmanager
def own_parameters(module: nn.Module, parameters: dict[str, nn.Parameter | None]) -> Iterator[None]:
    """Restore the parameters that a module had in an earlier call.

    Scope: this module's own parameters, whoever calls it.
    """
    before = module._parameters
    module.__dict__["_parameters"] = parameters
    try:
        yield
    finally:
        module.__dict__["_parameters"] = before


@contextmanager
def left_gathered(groups: Iterable[Any]) -> Iterator[None]:
    """Let weights that FSDP2 gathers for a forward stay gathered after it.

    Sets the attribute behind ``set_reshard_after_forward(False)`` and restores it, since there is no public way to read
    the user's choice.

    Scope: these groups of parameters, whoever calls their modules.
    """
    before = [(group, group.post_forward_mesh_info) for group in groups]
    try:
        for group, _ in before:
            group.post_forward_mesh_info = None
        yield
    finally:
        for group, chosen in before:
            group.post_forward_mesh_info = chosen


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Let a module be called inside its own call without running its forward hooks a second time.

    Scope: this module, whoever calls it.
    """
    before = {name: module.__dict__[name] for name in ("_forward_pre_hooks", "_forward_hooks")}
    try:
        module.__dict__.update({name: OrderedDict() for name in before})
        yield
    finally:
        module.__dict__.update(before)


@contextmanager
def forward_replaced_by(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Redirect a call of a module to ``run``, inside which the module is restored.

    The module's hooks and wrappers see one ordinary call, whatever ``run`` does with the module.

    Scope: this module, whoever calls it.
    """
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with replaced_forwards({module: own}), without_hooks(module):
            return run(*args, **kwargs)

    with replaced_forwards({module: forward}):
        yield
