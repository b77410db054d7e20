"""Code of others in a model: subclasses, forwards, hooks, of which nothing is known but what comparisons show."""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

# Packages whose models and wrappers treat a row's tokens as transformers does.
_OF_TRANSFORMERS = ("transformers.", "peft.", "accelerate.", "trl.", "liger_kernel.")
_KNOWN = ("torch.", "torchao.", "bitsandbytes.", "cggr_", *_OF_TRANSFORMERS)
# Elements of a container or a tensor that may be a list of tokens.
_FEW = 64
_OF_TOKENS = re.compile(r"token|_ids?$|index").search


def surrounds_layers(model: nn.Module, base: nn.Module, layers: nn.ModuleList) -> bool:
    """Whether code of others runs around a model's layers, where it may make positions, documents and masks.

    Args:
        model: The model.
        base: The Hugging Face model inside it.
        layers: Its layers.
    """
    names = next((name.split(".") for name, module in base.named_modules() if module is layers), [])
    around = [model, *(base.get_submodule(".".join(names[:count])) for count in range(len(names)))]
    return any(_is_of_others(module) for module in around)


def is_in(model: nn.Module) -> bool:
    """Whether code of others runs anywhere in a model."""
    return any(_is_of_others(module) for module in model.modules())


def tokens_named(model: nn.Module, configs: Iterable[Any], vocab_size: int) -> list[int]:
    """Numbers that may be tokens which a model treats in a special way, as far as they can be read.

    Args:
        model: The model.
        configs: Its configs.
        vocab_size: Tokens are below this.

    Returns:
        Those that the code of others holds first (its modules' attributes and buffers, and the constants and variables
        of its functions), then the tokens of the configs.
    """
    found: dict[int, None] = {}

    def note(value: Any) -> None:
        if type(value) is int and 0 <= value < vocab_size:
            found[value] = None
        elif isinstance(value, (list, tuple, set, frozenset)) and len(value) <= _FEW:
            for each in value:
                note(each)
        elif isinstance(value, Tensor) and not value.is_floating_point() and 0 < value.numel() <= _FEW:
            note(value.flatten().tolist())

    seen: set[int] = set()
    for module in model.modules():
        called = [each for each in _called(module) if next(_of_others(each), None) is not None]
        if called:
            for value in (*module._buffers.values(), *vars(module).values(), *_held(called, seen)):
                note(value)
    for config in configs:
        for name, value in vars(config).items():
            if _OF_TOKENS(name):
                note(value)
    return list(found)


def _is_of_others(module: nn.Module) -> bool:
    return any(next(_of_others(called), None) is not None for called in _called(module))


def _called(module: nn.Module) -> list[Callable[..., Any]]:
    """What a module's call runs."""
    return [module.forward, *module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _of_others(called: Callable[..., Any]) -> Iterator[FunctionType]:
    """The functions of others among a callable and what it wraps."""
    waiting: list[Any] = [called]
    while waiting:
        each = waiting.pop()
        if isinstance(each, partial):
            waiting += [each.func, *(part for part in each.args if callable(part) and not isinstance(part, nn.Module))]
            continue
        function = getattr(each, "__func__", each)
        if not isinstance(function, FunctionType):
            call = inspect.getattr_static(type(each), "__call__", None)
            waiting += [call] if isinstance(call, FunctionType) else []
            continue
        waiting += filter(None, [getattr(function, "__wrapped__", None)])
        if not _is_known(function):
            yield function


def _is_known(function: FunctionType) -> bool:
    # Not ``__module__``, which a wrapper takes over from what it wraps.
    return str(function.__globals__.get("__name__", "")).startswith(_KNOWN)


def _held(called: Iterable[Callable[..., Any]], seen: set[int]) -> Iterator[Any]:
    """What functions of others, and those that they call, hold: constants, globals, enclosed variables, attributes."""
    waiting: list[Any] = list(called)
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, MethodType) and not isinstance(each.__self__, nn.Module):
            waiting.append(each.__self__)
        function = getattr(each, "__func__", each)
        if isinstance(function, FunctionType):
            held = [] if _is_known(function) else list(_of_function(function))
            if held and isinstance(each, MethodType):  # methods and class attributes that it reads
                kind = type(each.__self__)
                held += [inspect.getattr_static(kind, name, None) for name in function.__code__.co_names]
        elif isinstance(each, partial):
            held = [each.func, *each.args, *each.keywords.values()]
        else:
            of_others = not isinstance(each, (type, nn.Module)) and not f"{type(each).__module__}.".startswith(_KNOWN)
            held = list(vars(each).values()) if of_others and hasattr(each, "__dict__") else []
        yield from held
        waiting += [value for value in held if callable(value)]


def _of_function(function: FunctionType) -> Iterator[Any]:
    codes = [function.__code__]
    for code in codes:
        yield from code.co_consts
        codes += [part for part in code.co_consts if isinstance(part, CodeType)]
        yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            yield cell.cell_contents
