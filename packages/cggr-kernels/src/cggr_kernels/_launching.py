"""Repeated launches of a kernel without Triton's own search for the compiled one.

Triton binds and classifies the arguments of each launch: more work for the host than the launch itself. Here the
compiled kernel is found by the arguments that it was compiled for, and is then called directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cggr_kernels._library import INTERPRETED

_MOST_KINDS = 256
ALIGNMENT = 16
"""In bytes: of rows and addresses for the copy engine; for aligned pointers Triton compiles kernels of their own."""


class Launch:
    """A kernel that is launched often.

    Its compile-time arguments and launch options are passed by keyword. Integers are part of the key by value, so that
    any specialisation of Triton's is a function of the key.

    Args:
        kernel: A function under ``triton.jit`` whose keyword arguments come last.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __call__(self, grid: int, *args: Tensor | TensorDescriptor | int, **constants: Any) -> None:
        """Launch ``grid`` programs on the current stream."""
        if INTERPRETED:
            self._kernel[(grid,)](*args, **constants)
            return
        key = [torch.cuda.current_device(), *constants.values()]
        for value in args:
            if isinstance(value, Tensor):
                key += (value.dtype, value.data_ptr() % ALIGNMENT == 0)
            elif isinstance(value, TensorDescriptor):
                key += (value.base.dtype, *value.block_shape)
            else:
                key.append(value)
        kind = tuple(key)
        found = self._compiled.get(kind)
        if found is None:
            compiled = self._kernel[(grid,)](*args, **constants)
            if len(self._compiled) >= _MOST_KINDS:
                self._compiled.clear()
            names = self._kernel.arg_names[len(args) :]
            self._compiled[kind] = compiled, tuple(constants[name] for name in names)
            return
        compiled, last = found
        compiled[grid, 1, 1](*args, *last)


def descriptor(tensor: Tensor, *block: int) -> TensorDescriptor:
    """Descriptor of a contiguous tensor, or of a copy if its address is not aligned for the copy engine.

    The constructor's checks take longer than a launch: they hold for contiguous tensors without empty dimensions whose
    rows are multiples of 16 bytes.

    Args:
        tensor: Contiguous.
        *block: Shape of a block.

    Returns:
        The descriptor.

    Example:
        >>> descriptor(torch.zeros(4, 16), 2, 16).block_shape
        [2, 16]
    """
    if tensor.data_ptr() % ALIGNMENT:
        tensor = tensor.clone()
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = tensor, list(tensor.shape), list(tensor.stride())
    made.block_shape, made.padding = list(block), "zero"
    return made
