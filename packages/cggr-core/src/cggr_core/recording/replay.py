"""One recorded call: a forward and a backward graph behind one node of the caller's autograd graph.

The backward graph writes each gradient to its own buffer, and autograd gets copies. Gradients are therefore
accumulated, clipped, scaled and hooked as in any step, and no caller holds a tensor that the next replay overwrites.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cggr_core.checks import first_derivatives_only
from cggr_core.recording.calls import Call, FixedInputs, Outcome

Run = Callable[[Any], Outcome]
"""Runs a :class:`~cggr_core.recording.calls.Call` of one kind."""
Replay = Callable[[], None]

# Relative to a gradient's norm, and to the norm of all gradients; kernels with nondeterministic sums differ by far
# less.
_TOLERANCE, _TOTAL_TOLERANCE = 0.05, 0.01
_FINDINGS = "findings"


class NotRecordedError(Exception):
    """Raised for a step that should not be recorded; the message says why."""


class Graphs(Protocol):
    """The interface for recording passes on a device; see :class:`~cggr_core.recording.cuda.CudaGraphs`."""

    def capture(self, run: Callable[[], list[Tensor]]) -> tuple[Replay, list[Tensor]]:
        """Record ``run``; returns how to replay it, and the tensors that hold its results."""
        ...

    def watched(self, run: Callable[[], Any]) -> Any:
        """Call ``run``, and raise :class:`NotRecordedError` if it made the host wait for the device."""
        ...

    def wait(self) -> None:
        """Wait for the device."""
        ...

    @property
    def held_bytes(self) -> int:
        """Memory that the recordings hold."""
        ...

    def allocated_bytes(self) -> int:
        """Memory of the tensors that exist now."""
        ...

    def check_room(self, needed: int) -> None:
        """Raise :class:`NotRecordedError` unless a recording of ``needed`` bytes would leave room for eager steps."""
        ...

    def random_state(self) -> Tensor:
        """State of the generator used by dropout."""
        ...

    def set_random_state(self, state: Tensor) -> None:
        """Restore a state."""
        ...


class PassAwaited:
    """A recorded forward pass, from its replay to its backward pass; deleted with the graph it belongs to."""

    def __init__(self) -> None:
        self.over = False


class SharedPlaces:
    """Memory shared by the recordings of one model, of which at most one can have a pending backward pass.

    Args:
        graphs: Records the passes.

    Attributes:
        gradients: Buffers that the backward graphs write to, by the index of the parameter among the trained ones.
    """

    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs
        self.gradients: dict[int, Tensor] = {}
        self._awaited: weakref.ref[PassAwaited] | None = None

    @property
    def busy(self) -> bool:
        """Whether a replayed forward pass may still get its backward pass."""
        awaited = None if self._awaited is None else self._awaited()
        return awaited is not None and not awaited.over

    def await_backward(self) -> PassAwaited:
        """Record that a forward pass was replayed."""
        awaited = PassAwaited()
        self._awaited = weakref.ref(awaited)
        return awaited


class Recording:
    """A step that is replayed for every call of its kind.

    Args:
        run: Runs a step the way it is recorded.
        as_it_is: Runs it as it would run without a recording.
        call: A call of the kind.
        model: The model whose parameters are trained.
        places: Shared with the model's other recordings.
        may_draw: Whether the step may draw random numbers besides those of ``draw``.

    Attributes:
        size: Of the call; the recording also serves smaller ones.
        eager_seconds: Of the step as it is, with its backward pass.
        replay_seconds: Of a replay, with its backward pass.

    Raises:
        NotRecordedError: If the step should not be recorded.
        RuntimeError: If it cannot be.
    """

    def __init__(
        self,
        run: Run,
        as_it_is: Run,
        call: Call,
        model: nn.Module,
        places: SharedPlaces,
        *,
        may_draw: bool,
    ) -> None:
        self._run, self._model, self._places = run, model, places
        self.size = call.size
        self._inputs = FixedInputs(call)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._leaves: list[nn.Parameter] = []
        self._connected: tuple[Tensor, ...] | None = None
        self._names: list[str] = []
        self._constants: dict[str, Any] = {}
        graphs = places.graphs
        state = graphs.random_state()
        try:
            self.eager_seconds = self._time(as_it_is)
            graphs.set_random_state(state)
            expected = self._rehearse()
            if not may_draw and not torch.equal(graphs.random_state(), state):
                raise NotRecordedError("checkpointed layers draw random numbers, which a replay cannot repeat")
            graphs.set_random_state(state)
            graphs.check_room(self._activations + self._bytes_of_gradients())
            self._replay_forward, results = graphs.capture(self._forward)
            self._values, self._numbers = results[: self._count], results[self._count :]
            self._upstream = [_even(value) for value in self._values]
            self._reached: list[int] = []
            self._replay_backward, _ = graphs.capture(self._backward)
            graphs.set_random_state(state)
            self._compare(*expected)
        finally:
            graphs.set_random_state(state)
            self._connected, self._leaves = None, []

    def check_worth(self, share: float) -> None:
        """Check that a replay takes at most a share of the time of the eager step.

        Raises:
            NotRecordedError: If it takes longer.
        """
        if self.replay_seconds > share * self.eager_seconds:
            raise NotRecordedError(
                f"a replay takes {self.replay_seconds * 1e3:.1f} ms and the eager step {self.eager_seconds * 1e3:.1f} "
                "ms: the step is not bound by launches"
            )

    def __call__(self, call: Call, draw: int | Tensor) -> Outcome:
        """Run a call by replaying the recording."""
        self._inputs.fill(call, draw)
        values = _Replayed.apply(self, *self._trained)
        numbers = dict(zip(self._names, (number.clone() for number in self._numbers), strict=True))
        found = numbers.pop(_FINDINGS, None)
        return Outcome(values, {**self._constants, **numbers}, found)

    def forward(self) -> tuple[tuple[Tensor, ...], PassAwaited]:
        """The values of a replay."""
        self._replay_forward()
        return tuple(value.clone() for value in self._values), self._places.await_backward()

    def backward(self, upstream: tuple[Tensor, ...], awaited: PassAwaited) -> list[Tensor | None]:
        """The gradients of the trained parameters.

        Raises:
            RuntimeError: If called a second time: the inputs of the backward pass are gone.
        """
        if awaited.over:
            raise RuntimeError(
                "the backward pass of a recorded step can run only once, even with retain_graph=True; to run it again, "
                "use CGGRModel(..., cuda_graph=False)"
            )
        awaited.over = True
        for place, arriving in zip(self._upstream, upstream, strict=True):
            place.copy_(arriving)
        self._replay_backward()
        gradients: list[Tensor | None] = [None] * len(self._trained)
        copies = torch._foreach_mul([self._places.gradients[place] for place in self._reached], 1.0)
        for place, copied in zip(self._reached, copies, strict=True):
            gradients[place] = copied
        return gradients

    def _forward(self, run: Run | None = None) -> list[Tensor]:
        from cggr_core.routing import replaced_parameters

        # The same values, but not a leaf of a graph that may still exist: such a leaf is bound to another stream.
        # Parameter hooks then see the gradients once, when autograd accumulates them.
        self._leaves = [nn.Parameter(parameter.detach()) for parameter in self._trained]
        with replaced_parameters(self._model, dict(zip(self._trained, self._leaves, strict=True))):
            outcome = (run or self._run)(self._inputs.call)
        self._connected, self._count = outcome.values, len(outcome.values)
        numbers = {name: value.detach() for name, value in outcome.metrics.items() if isinstance(value, Tensor)}
        self._constants = {name: value for name, value in outcome.metrics.items() if name not in numbers}
        if outcome.findings is not None:
            numbers[_FINDINGS] = outcome.findings
        self._names = list(numbers)
        return [*(value.detach() for value in outcome.values), *numbers.values()]

    def _backward(self) -> list[Tensor]:
        found = self._gradients(self._upstream)
        own = self._places.gradients
        self._reached = [place for place, gradient in enumerate(found) if gradient is not None]
        again = [place for place in self._reached if place in own]
        for place in self._reached:
            own.setdefault(place, found[place])
        if again:  # another recording's
            torch._foreach_copy_([own[place] for place in again], [found[place] for place in again])
        return [own[place] for place in self._reached]

    def _gradients(self, upstream: list[Tensor]) -> list[Any]:
        connected, self._connected = self._connected, None
        assert connected is not None  # of the forward pass
        reached = [number for number, value in enumerate(connected) if value.requires_grad]
        if not reached:
            raise NotRecordedError("the loss does not depend on any trained parameter")
        values, upstream = [connected[number] for number in reached], [upstream[number] for number in reached]
        return list(torch.autograd.grad(values, self._leaves, upstream, allow_unused=True))

    def _take(self, run: Run) -> tuple[list[Tensor], list[Tensor]]:
        """The values and the gradients of an eager step."""
        before = self._places.graphs.allocated_bytes()
        results = self._forward(run)
        self._activations = self._places.graphs.allocated_bytes() - before
        values = results[: self._count]
        return values, [gradient for gradient in self._gradients([_even(v) for v in values]) if gradient is not None]

    def _bytes_of_gradients(self) -> int:
        held = self._places.gradients
        return sum(own.nbytes for place, own in enumerate(self._trained) if place not in held)

    def _time(self, run: Run) -> float:
        """Seconds per step."""
        graphs = self._places.graphs
        graphs.wait()
        began = time.perf_counter()
        self._take(run)
        graphs.wait()
        return time.perf_counter() - began

    def _rehearse(self) -> tuple[list[float], list[float]]:
        """The values of the step to be recorded, their norm where they are tensors, and the norms of its gradients."""
        values, gradients = self._places.graphs.watched(lambda: self._take(self._run))
        return _norms(values), _norms(gradients)

    def _compare(self, values: list[float], norms: list[float]) -> None:
        """Compare the recording with the eager step, and time it."""
        graphs = self._places.graphs
        for upstream in self._upstream:
            upstream.copy_(_even(upstream))
        graphs.wait()
        began = time.perf_counter()
        self._replay_forward()
        self._replay_backward()
        graphs.wait()
        self.replay_seconds = time.perf_counter() - began
        found = _norms([self._places.gradients[place] for place in self._reached])
        total = sum(norm**2 for norm in norms) ** 0.5
        same = all(abs(a - b) <= _TOLERANCE * b for a, b in zip(_norms(self._values), values, strict=True))
        same = same and len(found) == len(norms)
        same = same and all(
            abs(a - b) <= _TOLERANCE * b + _TOTAL_TOLERANCE * total for a, b in zip(found, norms, strict=True)
        )
        if not same:
            raise NotRecordedError("a replay gives different numbers from the recorded step")


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, *trained: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        values, ctx.awaited = recording.forward()
        return values

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.recording.backward(upstream, ctx.awaited)


def _even(value: Tensor) -> Tensor:
    """The upstream gradient for comparing a recording: 1 for a loss, numbers of both signs for hidden states."""
    if not value.dim():
        return torch.ones_like(value)
    places = torch.arange(value.numel(), device=value.device, dtype=torch.float32)
    return places.cos().view(value.shape).to(value.dtype)


def _norms(tensors: list[Tensor]) -> list[float]:
    return torch.stack([norm.double() for norm in torch._foreach_norm(tensors)]).tolist() if tensors else []
