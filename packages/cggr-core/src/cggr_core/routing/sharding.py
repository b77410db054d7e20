"""Weights that FSDP2 shards over ranks: gathered once for all passes of a step if memory allows."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cggr_core.collectives import largest_over_ranks
from cggr_core.routing.patches import left_gathered

# Device memory to leave free besides the gathered weights.
MARGIN = 0.1
# By then the passes, the optimizer and everything else in a step have allocated their memory.
DECIDED_AFTER = 3


def shards_layers(layers: Iterable[nn.Module]) -> bool:
    """Whether ``fully_shard`` (FSDP2) was applied to the layers."""
    return any(hasattr(layer, "set_reshard_after_backward") for layer in layers)


class GatheredWeights:
    """Keeps the weights of a model's layers gathered between a context pass and its gradient pass.

    Two passes would gather every layer three times per step (context, gradient pass, backward); the standard step does
    so twice. Keeping weights gathered from the first pass to the second takes memory for the whole model on every rank.
    All ranks decide together, once, after a few steps, whether there is enough.

    Args:
        layers: The decoder layers.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._layers = tuple(layers)
        self._steps = 0
        self._held: list[Any] = []  # groups of parameters that may stay gathered
        self._in_step = False
        self._left = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """Context of a step in which a gradient pass follows a context pass.

        If something raises in between, the weights are resharded: otherwise the next forward would find them gathered,
        with the values from before the optimizer step.
        """
        # Checked in every step: a model may be sharded after wrapping.
        if self._in_step or not shards_layers(self._layers):
            yield
            return
        self._steps += 1
        if self._steps == DECIDED_AFTER:
            self._held = _groups(self._layers) if self._memory_suffices_on_all_ranks() else []
        self._in_step = True
        try:
            yield
        finally:
            self._in_step = False
            if self._left:
                self._left = False
                for layer in self._layers:
                    reshard: Any = getattr(layer, "reshard", None)
                    if reshard is not None:
                        reshard()

    @contextmanager
    def context_pass(self) -> Iterator[None]:
        """Context of a context pass; its layers stay gathered if the step allows it."""
        held = self._held if self._in_step else []
        self._left = self._left or bool(held)
        with left_gathered(held):
            yield

    def after_gradient_pass(self) -> None:
        """Every layer has run again and was resharded according to its settings."""
        self._left = False

    def _memory_suffices_on_all_ranks(self) -> bool:
        first = next(parameter for layer in self._layers for parameter in layer.parameters())
        lacks_room = torch.tensor(
            not _memory_suffices(self._layers, first.device), dtype=torch.int32, device=first.device
        )
        # If one rank gathers and another does not, the first waits forever.
        return not bool(largest_over_ranks(lacks_room))


def _memory_suffices(layers: Iterable[nn.Module], device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    if device.type != "cuda":
        return False  # the device's free memory cannot be queried
    free, total = torch.cuda.mem_get_info(device)
    return bytes_when_gathered(layers) <= free - MARGIN * total


def bytes_when_gathered(layers: Iterable[nn.Module]) -> int:
    """Memory of all weights of the layers on one rank, in the dtype they are gathered in, in bytes."""
    layers = tuple(layers)
    cast = {id(p): group.mp_policy.param_dtype for group in _groups(layers) for p in _parameters(group)}
    return sum(
        parameter.numel() * (cast.get(id(parameter)) or parameter.dtype).itemsize
        for layer in layers
        for parameter in layer.parameters()
    )


def _parameters(group: Any) -> list[nn.Parameter]:
    return [sharded.sharded_param for sharded in group.fsdp_params]


def _groups(layers: Iterable[nn.Module]) -> list[Any]:
    """FSDP2's parameter groups in the layers; none if this torch stores them elsewhere."""
    found: list[Any] = []
    for layer in layers:
        for module in layer.modules():
            find: Any = getattr(module, "_get_fsdp_state", None)
            state = None if find is None else find()
            groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.12 on
            if groups is None:
                group = getattr(state, "_fsdp_param_group", None)
                groups = [] if group is None else [group]
            found += groups
    return found
