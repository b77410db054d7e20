"""What a model's own loss may read: attributes, tensors, small containers, and what a function has closed over."""

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

PLAIN = frozenset((bool, int, float, str, type(None)))
_CONTAINERS = frozenset((list, tuple, dict, set))
# Of containers, and of tensors that are read by value; larger tensors by their version.
_MOST = 64
_LIBRARIES = ("transformers", "torch", "peft", "accelerate", "builtins", "numpy")

Values = Callable[[], Mapping[str, Any]]


class _Version:
    """A tensor and how often it was written to; equal to itself unwritten."""

    def __init__(self, tensor: Tensor) -> None:
        # Not the tensor, which would live on; and not its id, which the next one may have.
        self._tensor = weakref.ref(tensor)
        self._version = 0 if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Version):
            return NotImplemented
        tensor = self._tensor()
        return tensor is not None and tensor is other._tensor() and self._version == other._version

    __hash__ = None  # type: ignore[assignment]


def readable(value: Any) -> bool:
    """Whether a change of a value can be seen: a plain one, a tensor that is not trained, a small container."""
    if type(value) in PLAIN:
        return True
    if isinstance(value, Tensor):
        return not value.requires_grad
    if type(value) not in _CONTAINERS or len(value) > _MOST:
        return False
    parts = (*value.keys(), *value.values()) if isinstance(value, dict) else value
    return all(type(part) in PLAIN or isinstance(part, Tensor) for part in parts)


def snapshot(value: Any) -> Any:
    """What to compare later with the same of a :func:`readable` value; reads nothing from a device."""
    if isinstance(value, Tensor):
        if type(value) is Tensor and value.device.type == "cpu" and value.numel() <= _MOST:
            # Also where it is written to through its data, which counts no version; as text, in which NaN equals NaN.
            return value.dtype, repr(value.tolist())
        return _Version(value)
    if type(value) in PLAIN:
        return value
    if isinstance(value, dict):
        return {name: snapshot(part) for name, part in value.items()}
    return set(value) if isinstance(value, set) else [snapshot(part) for part in value]


def places(base: nn.Module, parts: Iterable[nn.Module], losses: Iterable[Any]) -> dict[Hashable, Values]:
    """Where a loss may read: functions that return names and current values, under keys that stay the same.

    Args:
        base: The model.
        parts: Modules of it that may be losses.
        losses: Its loss functions.
    """
    modules = [base, *parts]
    for loss in losses:
        modules += loss.modules() if isinstance(loss, nn.Module) else []
    found: dict[Hashable, Values] = {}
    for module in modules:
        for values in (module.__dict__, module._buffers, module._parameters):
            found[id(values)] = partial(_same, values)
    functions = [*losses, type(base).forward, base.__dict__.get("forward")]
    objects: list[Any] = [part for module in modules for part in module.__dict__.values()]
    for function in functions:
        for key, reads in _of_function(function):
            objects += reads().values()
            found[key] = reads
    for holder in (*losses, *objects):
        if _is_own_object(holder):
            found[id(holder.__dict__)] = partial(_same, holder.__dict__)
    return found


def _same(values: Mapping[str, Any]) -> Mapping[str, Any]:
    return values


def _is_own_object(holder: Any) -> bool:
    kind = type(holder)
    library = kind.__module__.split(".")[0] in _LIBRARIES
    return not library and not isinstance(holder, type | nn.Module | Tensor) and hasattr(holder, "__dict__")


def _of_function(function: Any) -> Iterator[tuple[Hashable, Values]]:
    """Arguments that are bound to a function, its defaults, variables it has closed over, and globals it names."""
    if isinstance(function, partial):
        yield id(function.keywords), partial(_same, function.keywords)
        yield id(function), partial(_numbered, function.args)
        yield from _of_function(function.func)
    elif isinstance(function, MethodType):
        yield (id(function.__self__), "self"), partial(_same, {"self": function.__self__})
        yield from _of_function(function.__func__)
    elif isinstance(function, FunctionType):
        for read in (_defaults, _closed_over, _globals):
            yield (id(function), read.__name__), partial(read, function)
    elif not isinstance(function, nn.Module):
        yield from _of_function(type(function).__dict__["__call__"]) if "__call__" in type(function).__dict__ else ()


def _numbered(values: Iterable[Any]) -> dict[str, Any]:
    return {str(number): value for number, value in enumerate(values)}


def _defaults(function: FunctionType) -> dict[str, Any]:
    return _numbered(function.__defaults__ or ()) | (function.__kwdefaults__ or {})


def _closed_over(function: FunctionType) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not yet assigned
            found[name] = None
    return found


def _globals(function: FunctionType) -> dict[str, Any]:
    values = function.__globals__
    return {name: values[name] for name in function.__code__.co_names if name in values}
