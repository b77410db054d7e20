"""The arguments of a training forward: those fixed in a recording, and static buffers for those that change."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cggr_core.selection import slots_in_buckets

# Numbers that change from step to step and are read on the device: integers,
_COUNTED = ("draw", "first_row")
# and one of any kind.
_ITEMS = "num_items"


@dataclass(frozen=True)
class StepCall:
    """One call of :meth:`cggr_core.CGGRModel.forward` in training.

    Attributes:
        arguments: Of the wrapped model's forward.
        given: The forward's own arguments, by name.
    """

    arguments: Mapping[str, Any]
    given: Mapping[str, Any]

    @property
    def device(self) -> torch.device:
        """The device of the step."""
        return self.given["labels"].device

    def items(self) -> Iterator[tuple[str, Any]]:
        """All arguments by name."""
        yield from self.arguments.items()
        yield from self.given.items()

    def obstacle(self) -> str | None:
        """Why a step with these arguments cannot be recorded; ``None`` if it can."""
        for name in ("selection", "example_ids"):
            if self.given.get(name) is not None:
                return f"{name} is passed in"
        for name, value in self.items():
            if name in _COUNTED or name == _ITEMS or value is None:
                continue
            if not isinstance(value, Tensor):
                try:
                    hash(value)
                except TypeError:
                    return f"the argument {name} is a {type(value).__name__}, which cannot be compared between steps"
            elif value.requires_grad:
                return f"the argument {name} requires gradients"
            elif value.device != self.device:
                return f"the argument {name} is on {value.device}, but the labels are on {self.device}"
        return None

    def in_bucket(self) -> StepCall:
        """The same step with its slots rounded up; the extra ones hold no kept token and have zero weight."""
        slots = self.given["slots"]
        if slots is None:
            return self
        return self.with_slots(slots_in_buckets(slots, self.given["labels"].shape[1]))

    def with_slots(self, slots: int | None) -> StepCall:
        """The same step with another number of slots."""
        return StepCall(self.arguments, {**self.given, "slots": slots})

    def key(self) -> Hashable:
        """What a recording of the step bakes in: names, shapes, dtypes, non-tensor values, autocast."""
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind) and (
            torch.get_autocast_dtype(kind),
            torch.is_autocast_cache_enabled(),
        )
        return (self.device, autocast, *(_built_in(name, value) for name, value in self.items()))


def _built_in(name: str, value: Any) -> Hashable:
    if name in _COUNTED:
        return None
    if name == _ITEMS and value is not None:
        return name, _on_device(value) and (value.shape, value.dtype)
    if isinstance(value, Tensor):
        return name, value.shape, value.dtype
    return name, type(value), value


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


class FixedInputs:
    """Static buffers for the tensors that a recorded step reads.

    Args:
        call: A step like all that follow.
        draw: Number of its random draw.

    Attributes:
        call: The same step, reading these buffers.
    """

    def __init__(self, call: StepCall, draw: int | Tensor) -> None:
        device = call.device
        self._places = {name: torch.zeros((), dtype=torch.int64, device=device) for name in _COUNTED}
        for name, value in call.items():
            if name == _ITEMS and value is not None and not _on_device(value):
                self._places[name] = torch.zeros((), device=device)
            elif isinstance(value, Tensor) and name not in _COUNTED:
                self._places[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
        self.fill(call, draw)
        parts = ({name: self._places.get(name, value) for name, value in part.items()} for part in _parts(call))
        self.call = StepCall(*parts)

    def fill(self, call: StepCall, draw: int | Tensor) -> None:
        """Copy the values of a step into the static buffers."""
        given: dict[str, Any] = dict(call.items()) | {"draw": draw}
        for name, place in self._places.items():
            value = given[name]
            if _on_device(value) or place.dim():
                place.copy_(value, non_blocking=True)
            else:
                place.fill_(value if not isinstance(value, Tensor) else value.item())


def _parts(call: StepCall) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return call.arguments, call.given


@dataclass(frozen=True)
class StepOutcome:
    """Results of a step, recorded or not.

    Attributes:
        loss: Scalar, connected to the graph.
        metrics: See :attr:`cggr_core.CGGRModel.metrics`.
        findings: float32 ``[3]``, see :class:`~cggr_core.step.DeferredErrors`.
    """

    loss: Tensor
    metrics: dict[str, Any]
    findings: Tensor
