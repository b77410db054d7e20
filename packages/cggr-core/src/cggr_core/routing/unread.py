"""Arguments that nothing in a model reads: a forward that takes any keyword would drop them without a word."""

import inspect
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import cache
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs

from cggr_core.routing.architectures import unwrapped

# What every forward takes, by transformers' own decorators and PEFT's.
_TAKEN_BY_ALL = frozenset(TransformersKwargs.__annotations__) | {
    "adapter_names", "alora_offsets", "attention_mask", "cache", "cache_position", "input_ids", "inputs_embeds",
    "logits_to_keep", "past_key_values", "position_ids", "return_dict", "token_type_ids", "use_cache",
}  # fmt: skip
# Their methods read arguments of other calls than a forward.
_NOT_MODELS = ("torch.", "transformers.modeling_utils", "transformers.generation", "transformers.utils", "peft.")


def check_read(model: nn.Module, names: Iterable[str]) -> None:
    """Raise if an argument of a forward would have no effect.

    An argument is read if a method of some module, or the model's attention function, has a parameter of its name or
    mentions the name.

    Args:
        model: The model.
        names: Of the arguments.

    Raises:
        ValueError: Naming it, and what may have been meant.
    """
    unknown = sorted(set(names) - _TAKEN_BY_ALL - _mentioned(type(unwrapped(model)).forward))
    if not unknown or any(module._forward_pre_hooks_with_kwargs for module in model.modules()):
        return
    read = _TAKEN_BY_ALL.union(*map(_mentioned, _functions(model)))
    unread = [name for name in unknown if name not in read]
    if unread:
        kind = type(unwrapped(model)).__name__
        near = get_close_matches(unread[0], _TAKEN_BY_ALL | _mentioned(type(unwrapped(model)).forward), n=1)
        raise ValueError(
            f"{', '.join(unread)}: nothing in {kind} reads an argument of this name, so it would be ignored; "
            + (f"did you mean {near[0]}? Else leave it out" if near else "leave it out")
        )


def _functions(model: nn.Module) -> Iterator[Any]:
    """The methods of the modules that are the model's own, and its attention function."""
    for kind in {base for module in model.modules() for base in type(module).__mro__}:
        if not kind.__module__.startswith(_NOT_MODELS):
            yield from (value for value in vars(kind).values() if callable(value))
    for module in model.modules():
        if "forward" in module.__dict__:
            yield module.__dict__["forward"]
    name = getattr(unwrapped(model).config.get_text_config(), "_attn_implementation", None)
    if name in ALL_ATTENTION_FUNCTIONS:
        yield ALL_ATTENTION_FUNCTIONS[name]


@cache
def _mentioned(function: Any) -> frozenset[str]:
    """The parameters of a function, and the strings in its code."""
    found: set[str] = set()
    while function is not None:
        function = getattr(function, "func", function)  # a partial's
        plain = getattr(function, "__func__", function)
        if isinstance(plain, FunctionType):
            code = plain.__code__
            found |= set(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
            found |= set(_strings(code))
            for annotation in inspect.get_annotations(plain).values():  # Unpack[...] of a TypedDict
                for typed in getattr(annotation, "__args__", ()):
                    found |= set(getattr(typed, "__annotations__", ()))
        function = getattr(plain, "__wrapped__", None)
    return frozenset(found)


def _strings(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _strings(constant)
