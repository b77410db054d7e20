"""Weights that FSDP2 shards over ranks: gathered once for all passes of a step, where memory allows."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cggr_core.collectives import largest_over_ranks
from cggr_core.routing.patches import left_gathered

# Memory of a device that stays free besides the gathered weights.
MARGIN = 0.1
# By then the passes, the optimizer and whatever else a step needs have taken their memory.
DECIDED_AFTER = 3


def shards_layers(layers: Iterable[nn.Module]) -> bool:
    """Whether ``fully_shard`` (FSDP2) was applied to the layers."""
    return any(hasattr(layer, "set_reshard_after_backward") for layer in layers)


class GatheredWeights:
    """What keeps the weights of a model's layers gathered between a context pass and its gradient pass.

    Two passes would gather every layer three times a step (context, gradient pass, backward), where the standard step
    does so twice. Weights that stay gathered from the first pass to the second take the memory of the whole model on
    every rank, for that long; whether it is there is decided once, by all ranks together, after a few steps.

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
        """The length of a step, in which a gradient pass follows a context pass.

        Where it does not, because something raised in between, the weights are sharded again: the next forward would
        find them gathered, and as they were before the optimizer changed them.
        """
        # Asked in every step: a model may be sharded after it was wrapped.
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
        """A context pass: its layers stay gathered, within a step that may leave them so."""
        held = self._held if self._in_step else []
        self._left = self._left or bool(held)
        with left_gathered(held):
            yield

    def after_gradient_pass(self) -> None:
        """Every layer has been run again, and has been sharded again as its settings say."""
        self._left = False

    def _memory_suffices_on_all_ranks(self) -> bool:
        first = next(parameter for layer in self._layers for parameter in layer.parameters())
        lacks_room = torch.tensor(
            not _memory_suffices(self._layers, first.device), dtype=torch.int32, device=first.device
        )
        # One rank that gathers while another does not would wait for ever.
        return not bool(largest_over_ranks(lacks_room))


def _memory_suffices(layers: Iterable[nn.Module], device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    if device.type != "cuda":
        return False  # its memory cannot be asked about
    free, total = torch.cuda.mem_get_info(device)
    return bytes_when_gathered(layers) <= free - MARGIN * total


def bytes_when_gathered(layers: Iterable[nn.Module]) -> int:
    """Memory of all weights of the layers on one rank, in the dtype that they are gathered in."""
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
    """FSDP2's groups of parameters in the layers; none where this torch keeps them elsewhere."""
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
