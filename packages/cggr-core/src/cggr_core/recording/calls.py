"""The arguments of recorded calls: those fixed in a recording, and static buffers for those that change."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from cggr_core.selection import Selection
from cggr_core.slots import slots_in_buckets

# Numbers that change from step to step and are read on the device: integers,
_COUNTED = ("draw", "first_row")
# and one of any kind.
_ITEMS = "num_items"
_CONTEXT, _SELECTION = "context.", "selection."


class Call(ABC):
    """A call that can be recorded, with its arguments by name."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it runs."""

    @abstractmethod
    def items(self) -> Iterator[tuple[str, Any]]:
        """All arguments by name."""

    @abstractmethod
    def reading(self, places: Mapping[str, Tensor]) -> Self:
        """The same call with other tensors, by name."""

    def obstacle(self) -> str | None:
        """Why a call with these arguments cannot be recorded; ``None`` if it can."""
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

    @property
    def size(self) -> int:
        """What a recording must hold to serve the call, where one serves several sizes."""
        return 0

    def of_size(self, size: int) -> Self:
        """A call of the same kind and of a larger size."""
        return self

    def key(self) -> Hashable:
        """What a recording of the call bakes in: names, shapes, dtypes, non-tensor values, autocast."""
        kind = self.device.type
        autocast = torch.is_autocast_enabled(kind) and (
            torch.get_autocast_dtype(kind),
            torch.is_autocast_cache_enabled(),
        )
        return (self.device, autocast, *(_built_in(name, value) for name, value in self.items()))


@dataclass(frozen=True)
class StepCall(Call):
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

    def reading(self, places: Mapping[str, Tensor]) -> Self:
        """The same step with other tensors, by name."""
        return type(self)(_replaced(self.arguments, places), _replaced(self.given, places))

    def obstacle(self) -> str | None:
        """Why a step with these arguments cannot be recorded; ``None`` if it can."""
        for name in ("selection", "example_ids"):
            if self.given.get(name) is not None:
                return f"{name} is passed in"
        return super().obstacle()

    @property
    def size(self) -> int:
        """Its slots, if they are counted in every step."""
        return self.given["slots"] or 0

    def of_size(self, size: int) -> StepCall:
        """The same step with more slots; the extra ones hold no kept token and have zero weight."""
        return self.with_slots(size) if self.size else self

    def key(self) -> Hashable:
        """As of any call, except that steps with up to half as many slots again are of one kind."""
        return super(StepCall, self.with_slots(_shared_by(self.size) or None)).key()

    def in_bucket(self) -> StepCall:
        """The same step with its slots rounded up; the extra ones hold no kept token and have zero weight."""
        slots = self.given["slots"]
        if slots is None:
            return self
        return self.with_slots(slots_in_buckets(slots, self.given["labels"].shape[1]))

    def with_slots(self, slots: int | None) -> StepCall:
        """The same step with another number of slots."""
        return StepCall(self.arguments, {**self.given, "slots": slots})


@dataclass(frozen=True)
class PassCall(Call):
    """One gradient pass, from whose results a loss is computed outside the recording.

    Attributes:
        arguments: Of the model's forward.
        context: The context that several rows continue, by name; empty for none.
        selection: The kept tokens.
    """

    arguments: Mapping[str, Any]
    context: Mapping[str, Any]
    selection: Selection

    @property
    def device(self) -> torch.device:
        """The device of the pass."""
        return self.selection.index.device

    def items(self) -> Iterator[tuple[str, Any]]:
        """All arguments by name."""
        yield from self.arguments.items()
        yield from _prefixed(_CONTEXT, self.context).items()
        yield from _prefixed(_SELECTION, vars(self.selection)).items()

    def reading(self, places: Mapping[str, Tensor]) -> Self:
        """The same pass with other tensors, by name."""
        context, selection = (
            {name.removeprefix(prefix): value for name, value in _replaced(_prefixed(prefix, named), places).items()}
            for prefix, named in ((_CONTEXT, self.context), (_SELECTION, vars(self.selection)))
        )
        return type(self)(_replaced(self.arguments, places), context, Selection(**selection))


def _shared_by(slots: int) -> int:
    """Slots rounded up to a power of two, or to one and a half times one."""
    power = 1 << (slots - 1).bit_length() if slots else 0
    return power * 3 // 4 if slots <= power * 3 // 4 else power


def _prefixed(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}{name}": value for name, value in named.items()}


def _replaced(arguments: Mapping[str, Any], places: Mapping[str, Tensor]) -> Mapping[str, Any]:
    return {name: places.get(name, value) for name, value in arguments.items()}


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
    """Static buffers for the tensors that a recorded call reads.

    Args:
        call: A call like all that follow.

    Attributes:
        call: The same call, reading these buffers.
    """

    def __init__(self, call: Call) -> None:
        device = call.device
        self._places = {
            name: torch.zeros((), dtype=torch.int64, device=device) for name, _ in call.items() if name in _COUNTED
        }
        for name, value in call.items():
            if name == _ITEMS and value is not None and not _on_device(value):
                self._places[name] = torch.zeros((), device=device)
            elif isinstance(value, Tensor):
                self._places[name] = torch.empty(value.shape, dtype=value.dtype, device=device)
        self.fill(call, 0)
        self.call = call.reading(self._places)

    def fill(self, call: Call, draw: int | Tensor) -> None:
        """Copy the values of a call into the static buffers."""
        given: dict[str, Any] = dict(call.items()) | {"draw": draw}
        for name, place in self._places.items():
            value = given[name]
            if _on_device(value) or place.dim():
                place.copy_(value, non_blocking=True)
            else:
                place.fill_(value if not isinstance(value, Tensor) else value.item())


@dataclass(frozen=True)
class Outcome:
    """Results of a call, recorded or not.

    Attributes:
        values: Results connected to the graph; for a step, only the loss.
        metrics: See :attr:`cggr_core.CGGRModel.metrics`.
        findings: float32 ``[3]``, see :class:`~cggr_core.step.DeferredErrors`; ``None`` if nothing was checked.
    """

    values: tuple[Tensor, ...]
    metrics: dict[str, Any]
    findings: Tensor | None = None
