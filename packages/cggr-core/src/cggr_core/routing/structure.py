"""What was learned about a model holds while its structure stays the same; checked every step, so it must be cheap."""

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from functools import cache, partial
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks
from torch.nn.modules.dropout import _DropoutNd

from cggr_core.routing.architectures import unwrapped
from cggr_core.routing.heads import is_plain_matrix
from cggr_core.routing.loss_state import PLAIN, Values, places, readable, snapshot

# Attributes of a model or its config that a description reads, or that change its own loss.
_OF_THE_HEAD = ("final_logit_softcapping", "logits_scaling", "logit_scale")
_OF_THE_CONFIG = (*_OF_THE_HEAD, "output_router_logits", "_attn_implementation", "num_hidden_layers", "decoder_layers")
_OF_THE_MODEL = (*_OF_THE_HEAD, "loss_function", "_loss_function", "loss_type")
_LOSSES = ("loss_function", "_loss_function")
_KNOWN = ("torch.", "transformers.")
# Switches that do not affect what a forward computes, and noise rates, which comparisons set to 0; the rate at which
# layers are dropped is neither.
_NOT_READ = cache(re.compile(r"^_|^training$|^gradient_checkpointing$|^use_cache$|(?<!layer)drop|jitter").search)
# This many changes of one setting count each; after that, only those at powers of two.
_EVERY_CHANGE = 8


def structure(model: nn.Module) -> list[Any]:
    """The modules of a model, their forwards with the functions in them, their hooks, its head, and settings.

    Structures are compared with ``==``, which is identity for modules. Modules are kept alive, so that a new one cannot
    reuse the id of a replaced one. Takes half a microsecond per module.
    """
    base = unwrapped(model)
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    own = base.__dict__
    found: list[Any] = [
        head,
        is_plain_matrix(head),
        base.get_input_embeddings(),
        *(getattr(config, name, None) for name in _OF_THE_CONFIG),
        *(own.get(name) for name in _OF_THE_MODEL),
        # As bound methods: a step that replaces them restores equal ones, if not the same.
        base.forward,
        model.forward,
        *_of_others(module_hooks._global_forward_hooks, module_hooks._global_forward_pre_hooks),
    ]
    waiting: list[nn.Module | None] = [model]
    seen: set[int] = set()
    forwards: dict[type[nn.Module], Any] = {}
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            found.append(module)
            waiting.extend(module._modules.values())
            if module._forward_pre_hooks or module._forward_hooks:
                found.extend(_of_others(module._forward_pre_hooks, module._forward_hooks))
            compiled = module.__dict__.get("_compiled_call_impl")
            if compiled is not None:
                found.append(compiled)
            kind = type(module)
            if kind not in forwards:
                forwards[kind] = getattr(kind, "forward", None)  # the class of traced modules has none
            forward = module.__dict__.get("forward")
            if forward is not None and module is not base and module is not model:
                found.append(forward)
    for forward in forwards.values():
        names, values = _functions_named(forward)
        found.extend(map(values.get, names))
    return [*found, *forwards.values()]


@cache
def _functions_named(forward: Any) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """The names of global functions that a forward calls, which may be replaced, and the globals that hold them."""
    own = inspect.unwrap(forward)
    if not isinstance(own, FunctionType):
        return (), {}
    values = own.__globals__
    return tuple(name for name in own.__code__.co_names if isinstance(values.get(name), FunctionType)), values


def _of_others(*registered: Mapping[int, Any]) -> list[Any]:
    # Hooks of torch and transformers themselves only observe (a FLOP counter, a collector of hidden states) or load
    # weights, and come and go.
    return [
        hook
        for hooks in registered
        for hook in hooks.values()
        if not str(getattr(hook, "__module__", "")).startswith(_KNOWN)
    ]


class Settings:
    """The numbers, names and switches that forwards read from a model's modules, its configs and its loss.

    Of what a loss may read they are also tensors, small containers and variables that functions have closed over. A few
    hundred values take some ten microseconds to compare for 16 layers. A setting that changes in every step (a counter,
    a schedule) counts the first eight times, then, after a warning, at powers of two.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._changes: Counter[tuple[Hashable, str]] = Counter()
        self.look_at(model)

    def look_at(self, model: nn.Module) -> None:
        """Read the current settings of a model whose modules may have been replaced."""
        base = unwrapped(model)
        modules = list(model.modules())
        self._places = [
            (module.__dict__, name)
            for module in modules
            if module is not base
            for name, value in module.__dict__.items()
            if type(value) in PLAIN and not _NOT_READ(name) and not (name == "p" and isinstance(module, _DropoutNd))
        ]
        configs = [module.__dict__.get("config") for module in modules] + [base.config.get_text_config()]
        losses = [loss for name in _LOSSES if (loss := base.__dict__.get(name) or base._modules.get(name)) is not None]
        # Losses are such modules: without children, without parameters.
        bare = [part for part in base._modules.values() if part is not None and not (part._modules or part._parameters)]
        of_configs = {
            id(config.__dict__): partial(_itself, config.__dict__) for config in configs if hasattr(config, "__dict__")
        }
        self._open: dict[Hashable, Values] = {**of_configs, **places(base, bare, losses)}
        self._seen = self._values()

    def changed(self) -> bool:
        """Whether a setting has changed since the last call, in a way that counts."""
        values = self._values()
        if values == self._seen:
            return False
        before, self._seen = self._seen, values
        fixed = zip(self._places, before[0], values[0], strict=True)
        changed: list[tuple[Hashable, str]] = [(id(holder), name) for (holder, name), old, new in fixed if old != new]
        for place, old, new in zip(self._open, before[1], values[1], strict=True):
            changed += [(place, name) for name in old.keys() | new.keys() if old.get(name) != new.get(name)]
        self._changes.update(changed)
        often = sorted(name for place, name in changed if self._changes[place, name] == _EVERY_CHANGE + 1)
        if often:
            warnings.warn(
                f"{', '.join(often)} of the model, its config or its loss keeps changing; from now on, routed steps "
                "are compared with the model at changes 16, 32, 64 and so on. Set CGGR_VERIFY=n to compare every n-th "
                "step",
                stacklevel=5,
            )
        return any(self._changes[place] <= _EVERY_CHANGE or self._changes[place].bit_count() == 1 for place in changed)

    def _values(self) -> tuple[list[Any], list[dict[str, Any]]]:
        return [values.get(name) for values, name in self._places], [
            dict(_read(values())) for values in self._open.values()
        ]


def _itself(holder: Mapping[str, Any]) -> Mapping[str, Any]:
    return holder


def _read(holder: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in holder.items():
        if not _NOT_READ(name) and readable(value):
            yield name, snapshot(value)
