"""Checks shared by the ops. They look at shapes, dtypes and devices, never at values."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_kernels._library import DEVICE_TYPES

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MAX_VOCABULARY = 1 << 20


def check_device(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` unless all given tensors are on one device that the kernels run on.

    Args:
        **tensors: Tensors by argument name; ``None`` is skipped.

    Raises:
        ValueError: If a tensor is on another device.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    if first.device.type not in DEVICE_TYPES:
        raise ValueError(
            f"{first_name} is on {first.device}, but these kernels run on {' and '.join(DEVICE_TYPES)} only; "
            "use the functions of cggr_core, which work on any device"
        )
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, got {tensor.device} and {first.device}; move one of "
                "them"
            )


def check_float(name: str, tensor: Tensor, dims: int) -> None:
    """Raise unless ``tensor`` is float32, float16 or bfloat16 with ``dims`` dimensions.

    Args:
        name: Argument name for the message.
        tensor: The tensor to check.
        dims: Number of dimensions it must have.

    Raises:
        TypeError: If the dtype is not one of these.
        ValueError: If the number of dimensions is wrong.
    """
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(tensor.shape)}")


def check_index(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` is an int64 tensor of ``shape``.

    Args:
        name: Argument name for the message.
        tensor: The tensor to check.
        shape: Shape it must have.

    Raises:
        TypeError: If the dtype is not int64.
        ValueError: If the shape is wrong.
    """
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {tensor.dtype}; convert it with .long()")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_vocabulary(name: str, size: int) -> None:
    """Raise unless the vocabulary size is between 1 and ``MAX_VOCABULARY``.

    Args:
        name: Argument with the vocabulary dimension.
        size: Size of that dimension.

    Raises:
        ValueError: If the size is out of range.
    """
    if not 1 <= size <= MAX_VOCABULARY:
        raise ValueError(f"the vocabulary of {name} must have 1 to {MAX_VOCABULARY} entries, got {size}")


def check_first_derivatives() -> None:
    """Raise ``RuntimeError`` under ``create_graph=True``, where the kernels' gradients would count as constants."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph=True asks for second derivatives, which these kernels do not provide; use plain torch "
            "operations"
        )
