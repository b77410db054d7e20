"""Controls the order in which parts of a backward pass run."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _BackwardInTurn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, before: Tensor, values: list[Tensor]) -> tuple[Tensor, ...]:
        ctx.values = values
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        torch.autograd.backward(ctx.values, grads)
        return None, None


def backward_in_turn(values: Sequence[Tensor], *, before: Tensor) -> tuple[Tensor, ...]:
    """Run the backward pass of ``values`` as soon as their gradients are available, before that of ``before``.

    Autograd visits in reverse order of computation, so the graph of a context pass comes after all layers of the
    gradient pass. By then FSDP2 has reduced a layer's gradients and freed its weights. The keys and values of a context
    pass therefore get their backward inside the layer's own.

    Args:
        values: Tensors with their own graphs.
        before: A tensor that the layer computed from its input.

    Returns:
        The same numbers; tensors without a graph are returned unchanged.
    """
    graphs = [value for value in values if value.requires_grad]
    if not graphs:
        return tuple(values)
    replaced = iter(_BackwardInTurn.apply(before, graphs))
    return tuple(next(replaced) if value.requires_grad else value for value in values)
