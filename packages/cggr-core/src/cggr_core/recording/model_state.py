"""The parts of a model that a recording bakes in: checked before every replay, so the check must be nearly free."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# transformers hooks layers to collect requested outputs; no step requests any.
_INERT_HOOKS = "transformers.utils.output_capturing"
# Hooks that PEFT and checkpointing add to embeddings: whether a tensor requires gradients is baked into a recording.
_INERT_HOOK = "make_inputs_require_grad"
_TENSORS = ("_parameters", "_buffers")
_PLAIN = frozenset((bool, int, float, str, type(None)))


class ModelState:
    """The tensors of a model and their addresses, its modules' and configs' flags and numbers, and their hooks.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        configs = [module.__dict__.get("config") for module in self._modules]
        self._configs = list({id(config): config for config in configs if hasattr(config, "__dict__")}.values())
        self._held = [tensor for module in self._modules for tensor in _tensors(module)]  # so that no id is reused
        self._seen = self._look()

    def holds(self) -> bool:
        """Whether only the values of tensors have changed."""
        return self._look() == self._seen

    def _look(self) -> list[Hashable]:
        found: list[Hashable] = []
        for config in self._configs:
            found += _plain_values(config.__dict__)
        for module in self._modules:
            for name, value in module.__dict__.items():
                kind = type(value)
                if kind in _PLAIN:
                    found.append(value)
                elif name in _TENSORS:
                    for tensor in value.values():
                        if tensor is not None:
                            found.append((id(tensor), tensor.data_ptr(), tensor.requires_grad))
                elif name in _HOOKS:
                    if value:
                        found.append(tuple(map(id, value.values())))
                elif name == "forward":
                    found.append(value)
                elif name == "config":
                    found.append(id(value))
                elif kind is dict and value:  # scales of adapters
                    found += _plain_values(value)
        return found


def _plain_values(named: dict[Any, Any]) -> Iterator[Hashable]:
    for value in named.values():
        if type(value) in _PLAIN:
            yield value
        elif type(value) is dict:  # the parameters of rotary embeddings, in a config
            yield from _plain_values(value)


def checkpoints(model: nn.Module) -> bool:
    """Whether some module's activations are recomputed in the backward pass."""
    return any(
        module.__dict__.get("gradient_checkpointing") is True or hasattr(module, "checkpoint_fn")
        for module in model.modules()
    )


def obstacle_in(model: nn.Module, device: torch.device) -> str | None:
    """Why steps of a model cannot be recorded; ``None`` if no obstacle was found.

    Args:
        model: The model.
        device: Of its inputs.
    """
    if (
        module_hooks._global_forward_hooks
        or module_hooks._global_forward_pre_hooks
        or module_hooks._global_backward_hooks
    ):
        return "hooks are registered on all modules, which a replay would not run"
    for module in model.modules():
        name = type(module).__name__
        for hook in _hooks(module):
            if not _inert(hook):
                return f"a {name} has hooks, which a replay would not run"
        for tensor in _tensors(module):
            if tensor.device != device:
                return f"a {name} has a tensor on {tensor.device}, but the batch is on {device}"
            if tensor.requires_grad and type(tensor) is not nn.Parameter:
                return f"a {name} trains a {type(tensor).__name__}, whose storage may move between steps"
    return None


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for tensors in (module._parameters, module._buffers):
        for tensor in tensors.values():
            if tensor is not None:
                yield tensor


def _inert(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == _INERT_HOOKS or getattr(hook, "__name__", "").startswith(_INERT_HOOK)


def _hooks(module: nn.Module) -> Iterator[Any]:
    for registered in _HOOKS:
        yield from module.__dict__[registered].values()
    if hasattr(module, "_hf_hook"):  # accelerate's hooks, which replace the forward
        yield module.__dict__["_hf_hook"]
