"""Reuses what linear layers made of all tokens in the context pass when kept tokens run again in the gradient pass.

Two passes run kept tokens twice through the same layers, with the same results. Held from the first time, the outputs
of linear layers need no second product: kept rows are copied out of them, and only the backward pass multiplies.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.routing.architectures import Architecture
from cggr_core.routing.patches import is_noise_rate, uses_checkpointing
from cggr_core.routing.precision import makes_queries
from cggr_core.routing.rows import Places
from cggr_core.routing.sharding import shards_layers

# Rates in configs that a language model does not read.
_OF_OTHER_HEADS = ("summary", "classifier")

Forwards = dict[nn.Module, Callable[..., Any]]


class ReusableOutputs:
    """The linear layers of a model whose outputs can be reused.

    Args:
        model: The model.
        architecture: Its description.
    """

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        layers = architecture.layers
        self._architecture = architecture
        self._linears = [
            [(linear, makes_queries(layer, linear)) for linear in linears]
            for layer, linears in zip(layers, architecture.linears, strict=True)
        ]
        self._rates = [
            (module, holder, name)
            for module in model.modules()
            for holder in (module, module.__dict__.get("config"))
            for name, value in getattr(holder, "__dict__", {}).items()
            if isinstance(value, float) and is_noise_rate(holder, name)
            if not name.startswith(_OF_OTHER_HEADS)
        ]

    def of_a_pass(self, depth: int) -> "PassOutputs":
        """What a context pass through ``depth`` layers is to hold.

        Raises:
            ValueError: If kept tokens would compute something else in the gradient pass, or memory is to be saved.
        """
        checkpointed = any(map(uses_checkpointing, self._architecture.layers))
        if checkpointed or self._architecture.checkpoint_wrappers:
            raise ValueError(
                "reuse_outputs=True holds the outputs of linear layers, but gradient checkpointing is on, which "
                "releases them; switch one of the two off"
            )
        if any(module.training and getattr(holder, name) for module, holder, name in self._rates):
            raise ValueError(
                "reuse_outputs=True needs two passes with the same results, but the model is trained with dropout, "
                "which each draws for itself; set its rates to 0, or leave reuse_outputs=False"
            )
        if shards_layers(self._architecture.layers):
            raise ValueError(
                "reuse_outputs=True does not work with layers that FSDP2 shards; leave reuse_outputs=False"
            )
        return PassOutputs([pair for linears in self._linears[:depth] for pair in linears])


class PassOutputs:
    """Outputs of linear layers on all tokens, from a context pass to one gradient pass.

    Not held are those that the pass computes with gradients, of keys and values in gradient mode ``kv``: they are
    needed there in any case. Reused is an output ``[B, S, N]`` of a layer that ran once, for an input ``[B, K, M]``,
    unless it was changed in place since.

    Args:
        linears: The linear layers, and whether each makes queries.
    """

    def __init__(self, linears: list[tuple[nn.Linear, bool]]) -> None:
        self._linears = linears
        self._made: dict[nn.Linear, tuple[Tensor, int] | None] = {}

    def recording(self) -> Forwards:
        """Forwards of the context pass."""
        return {linear: partial(self._record, linear, queries) for linear, queries in self._linears}

    def reusing(self, places: Places) -> Forwards:
        """Forwards of the gradient pass.

        Args:
            places: Of the kept tokens.
        """
        return {linear: partial(self._reuse, linear, places) for linear in self._made}

    def _record(self, linear: nn.Linear, queries: bool, x: Tensor) -> Tensor:
        made = nn.Linear.forward(linear, x)
        if queries or not torch.is_grad_enabled():
            held = made.detach()
            self._made[linear] = None if linear in self._made else (held, held._version)
        return made

    def _reuse(self, linear: nn.Linear, places: Places, x: Tensor) -> Tensor:
        held = self._made.pop(linear, None)
        if held is None or not _belong_together(*held, x, places):
            return nn.Linear.forward(linear, x)
        rows = places.take(held[0])
        weight, bias = linear.weight, linear.bias
        # Under autocast the product has its dtype.
        cast = None if bias is None else bias.to(rows.dtype)
        return _Linear.apply(x.to(rows.dtype), weight.to(rows.dtype), cast, rows)


def _belong_together(made: Tensor, version: int, x: Tensor, places: Places) -> bool:
    batch, slots = places.index.shape
    tokens = made.dim() == x.dim() == 3 and made.shape[:2] == (batch, places.length) and x.shape[:2] == (batch, slots)
    return tokens and made._version == version


class _Linear(torch.autograd.Function):
    """A linear layer whose output is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, made: Tensor) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        flat = grad.flatten(0, -2)
        of_x = None if weight is None else (flat @ weight).unflatten(0, grad.shape[:-1])
        of_weight = None if x is None else flat.t() @ x.flatten(0, -2)
        return of_x, of_weight, flat.sum(0) if ctx.needs_input_grad[2] else None, None
