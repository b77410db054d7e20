"""Argument checks shared by the public functions.

Every check raises before anything is computed or changed, and says which argument is wrong, what came, what is
accepted, and what to do. Checks that have to look at a tensor's values run where that is free: on CPU tensors, outside
of ``torch.compile``. On other devices the callers count bad values on the device (:func:`count_bad_targets`) and raise
one step later, so that a step never waits for the device.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = [
    "check_at_least",
    "check_choice",
    "check_number",
    "check_finite_number",
    "check_flag",
    "check_float",
    "check_integer",
    "check_integers",
    "check_not_compiled",
    "check_num_items",
    "check_ratio",
    "check_same_device",
    "check_shape",
    "check_targets",
    "count_bad_targets",
    "first_derivatives_only",
    "values_are_free",
]


def values_are_free(tensor: Tensor) -> bool:
    """Whether reading a value of ``tensor`` costs no synchronisation and no graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_ratio(name: str, value: float) -> float:
    """Return ``value`` as a float if it lies in (0, 1].

    Args:
        name: Argument name for the error.
        value: A real number.

    Raises:
        TypeError: If ``value`` is not a real number.
        ValueError: If it is NaN or outside (0, 1].

    Example:
        >>> check_ratio("ratio", 0.25)
        0.25
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number in (0, 1], got {value!r} of type {type(value).__name__}")
    if not 0.0 < value <= 1.0:
        raise ValueError(
            f"{name} must be in (0, 1], got {value!r}; 0.25 keeps a quarter of the tokens, 1.0 all of them"
        )
    return float(value)


def check_finite_number(name: str, value: float, *, minimum: float = -math.inf) -> float:
    """Return ``value`` as a float if it is a finite number of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r} of type {type(value).__name__}")
    if not math.isfinite(value) or value < minimum:
        at_least = "" if minimum == -math.inf else f" of at least {minimum:g}"
        raise ValueError(f"{name} must be a finite number{at_least}, got {value!r}")
    return float(value)


def check_integer(name: str, value: int) -> int:
    """Return ``value`` if it is an integer."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an integer, got {value!r} of type {type(value).__name__}")
    return value


def check_at_least(name: str, value: int, minimum: int) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``."""
    if check_integer(name, value) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_flag(name: str, value: bool) -> bool:
    """Return ``value`` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")
    return value


def check_number(name: str, value: int | Tensor, minimum: int | None = None) -> int | Tensor:
    """Return ``value`` if it is an integer (of at least ``minimum``) or a 0-dim int64 tensor, which is not read."""
    if not isinstance(value, Tensor):
        return check_integer(name, value) if minimum is None else check_at_least(name, value, minimum)
    if value.dtype != torch.int64 or value.dim() != 0:
        raise TypeError(
            f"{name} must be an integer or a 0-dim int64 tensor, got {value.dtype} of shape {list(value.shape)}"
        )
    return value


def check_num_items(num_items: Tensor | float | None) -> None:
    """Raise unless ``num_items`` is None or one number, 0 at least; a tensor's value is checked where that is free.

    0 is what a step without a label has; see :func:`cggr_core.coefficients.divisor`.
    """
    if num_items is None:
        return
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got a tensor of shape {list(num_items.shape)}; sum it")
        if num_items.is_meta:
            raise ValueError("num_items must be a number, got a tensor on the meta device, which has no value")
        if not values_are_free(num_items):
            return
        num_items = num_items.item()
    if isinstance(num_items, bool) or not isinstance(num_items, int | float):
        raise TypeError(f"num_items must be a number above 0, got {num_items!r} of type {type(num_items).__name__}")
    if not (math.isfinite(num_items) and num_items >= 0):
        raise ValueError(f"num_items must be above 0, got {num_items!r}")


def check_choice(name: str, value: str, choices: Collection[str]) -> str:
    """Return ``value`` if it is one of ``choices``; the error names the nearest one.

    Args:
        name: Argument name for the error.
        value: The name that came.
        choices: The names that exist.

    Raises:
        ValueError: If ``value`` is none of them.

    Example:
        >>> check_choice("scoring", "entropy", ("entropy", "loss"))
        'entropy'
    """
    if value in choices:
        return value
    listed = ", ".join(repr(choice) for choice in choices)
    near = difflib.get_close_matches(str(value), list(choices), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {listed}, got {value!r}{hint}")


def check_float(name: str, tensor: Tensor) -> Tensor:
    """Return ``tensor`` if it is a tensor of a floating dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype} with shape {tuple(tensor.shape)}")
    return tensor


def check_integers(name: str, tensor: Tensor) -> Tensor:
    """Return ``tensor`` if it is a tensor of an integer dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got dtype {tensor.dtype}; use {name}.long()")
    return tensor


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> Tensor:
    """Return ``tensor`` if its shape is ``shape``; ``meaning`` says in the error where that shape comes from."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)} ({meaning}), got {tuple(tensor.shape)}")
    return tensor


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device} but {other_name} is on {other.device}; "
            f"move it with {name}.to({other_name}.device)"
        )


def count_bad_targets(targets: Tensor, vocab_size: int, ignore_index: int = -100) -> Tensor:
    """Number of targets that are neither ``ignore_index`` nor in the vocabulary: 0-dim int64, on their device."""
    bad = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    return bad.sum()


def check_targets(
    name: str, targets: Tensor, shape: Sequence[int], vocab_size: int, ignore_index: int, like: Tensor, like_name: str
) -> Tensor:
    """Return ``targets`` as int64 if dtype, shape, device and (on CPU) values are right.

    Args:
        name: Argument name for the errors.
        targets: Class indices.
        shape: The shape they must have.
        vocab_size: Number of classes.
        ignore_index: The value that stands for "no target".
        like: Tensor whose device they must share.
        like_name: Its name.

    Raises:
        TypeError: If the dtype is not an integer one.
        ValueError: If the shape, the device or (on CPU, outside of ``torch.compile``) a value is wrong.
    """
    check_shape(name, check_integers(name, targets), shape, f"one target per row of {like_name}")
    check_same_device(name, targets, like_name, like)
    targets = targets.long()
    if values_are_free(targets):
        count = int(count_bad_targets(targets, vocab_size, ignore_index))
        if count:
            raise ValueError(bad_targets_message(name, count, vocab_size, ignore_index, targets))
    return targets


def bad_targets_message(
    name: str, count: int, vocab_size: int, ignore_index: int, targets: Tensor | None = None
) -> str:
    """The text of the error about targets outside the vocabulary, naming the first of them if it is available."""
    first = ""
    if targets is not None:
        flat = targets.reshape(-1)
        bad = ((flat < 0) | (flat >= vocab_size)) & (flat != ignore_index)
        first = f" (the first is {int(flat[bad][0])})"
    return (
        f"{name} holds {count} value(s) outside the vocabulary{first}: "
        f"accepted are 0 to {vocab_size - 1} and ignore_index={ignore_index}"
    )


def first_derivatives_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a backward raise where second derivatives are wanted (``create_graph=True``), which it does not have.

    torch's ``once_differentiable`` raises later, and only if the upstream gradient has a graph: that of a loss has
    none, and its gradients would count as constants.
    """
    once = once_differentiable(backward)

    @wraps(backward)
    def run(ctx: Any, *upstream: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "create_graph=True asks for second derivatives, which this loss does not have; compute it from the "
                "model's logits"
            )
        return once(ctx, *upstream)

    return run


def check_not_compiled(model: nn.Module, layers: nn.ModuleList) -> None:
    """Raise if a model, its layers or their attention were compiled: compiled code would ignore the passes' changes.

    Raises:
        ValueError: If one was.
    """
    routed = {id(layer) for layer in layers}
    for name, module in model.named_modules():
        compiled = "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        if compiled and (
            not name or any(id(part) in routed or "Attention" in type(part).__name__ for part in module.modules())
        ):
            where = f"its {name}" if name else "it"
            raise ValueError(
                f"model {type(model).__name__} was compiled ({where}), but routed passes run the model's own modules; "
                "wrap the model without torch.compile, or compile its norms and MLPs only"
            )
