"""Decides which steps are recorded and when, and reports why a step is not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_core.recording.calls import Call, Outcome, StepCall
from cggr_core.recording.cuda import CudaClock, CudaGraphs
from cggr_core.recording.ledger import Clock, Ledger
from cggr_core.recording.model_state import ModelState, checkpoints, obstacle_in
from cggr_core.recording.obstacles import obstacle_now, obstacle_of
from cggr_core.recording.replay import Graphs, NotRecordedError, Recording, Run, SharedPlaces
from cggr_core.schedule import Schedule
from cggr_core.settings import SUPERVISED, RoutingSettings
from cggr_core.step import Draws

if TYPE_CHECKING:
    from cggr_core.routing import Engine

_logger = logging.getLogger(__name__)

MOST_RECORDINGS = 16
"""Number of recordings held at a time, in one memory pool; beyond it, the least recently used one is dropped."""
# A replay that takes more than this share of the eager step's time is not worth its memory.
_WORTH = 0.9
_SAID_AFTER = 24


class Recorder:
    """Replays the recording of a call if there is one.

    Args:
        run: Runs a call eagerly.
        engine: The passes over the model.
        device_type: Device type on which calls are recorded.
        graphs: Creates the recorder of a device.
        clock: Creates what times the steps of a device.

    Attributes:
        replayed: Whether the last call was.
    """

    def __init__(
        self,
        run: Run,
        engine: Engine,
        *,
        device_type: str = "cuda",
        graphs: Callable[[torch.device], Graphs] = CudaGraphs,
        clock: Callable[[torch.device], Clock] = CudaClock,
    ) -> None:
        self._run, self._engine = run, engine
        self._device_type, self._graphs, self._clock = device_type, graphs, clock
        self._ledger: Ledger | None = None
        self._eager_in_a_row = 0
        self._stopped: str | None = None
        self._said: set[str] = set()
        self._reason = ""
        self.replayed = False
        self._recordings: dict[Hashable, Recording] = {}
        self._places: SharedPlaces | None = None
        self._forget()

    def ready(self, device: torch.device) -> bool:
        """Whether a call on a device could be replayed or recorded, whatever its arguments; if not, it is counted."""
        self.replayed = False
        if device.type != self._device_type:
            return False
        reason = self._stopped or self._obstacle() or obstacle_now(device)
        if reason is not None:
            self._untimed(reason)
        return reason is None

    def take(self, call: Call) -> Outcome | None:
        """Replay a call, after :meth:`ready`; ``None`` if it must run eagerly."""
        reason = call.obstacle()
        if reason is not None:
            return self._untimed(reason)
        self._refresh()
        return self._replayed(call, self._run, lambda: 0)

    def _refresh(self) -> None:
        """Drop the recordings if the model has changed since."""
        changed = self._engine.seen != self._stamp or self._state is None or not self._state.holds()
        if self._recordings and changed:
            self._forget()

    def _replayed(
        self, call: Call, as_it_is: Run, next_draw: Callable[[], int | Tensor], *beside: Hashable
    ) -> Outcome | None:
        kind = (self._engine.seen, *beside, call.key())
        if self._ledger is None:
            self._ledger = Ledger(self._clock(call.device))
        ledger = self._ledger
        ledger.start(kind, call.size)
        recording = self._recordings.get(kind)
        if recording is not None and ledger.loses(kind):
            self._drop(kind)
            self._refuse(kind, "in this loop, replayed steps take longer than eager ones")
            recording = None
        if recording is None or recording.size < call.size:
            recording, reason = self._recorded(kind, call, as_it_is, ledger)
            if recording is None:
                return self._as_it_is(reason)
        else:
            ledger.took(replay=True)
            self._recordings[kind] = self._recordings.pop(kind)  # the last one is the most recently used
        self.replayed = True
        self._eager_in_a_row = 0
        return recording(call, next_draw())

    @property
    def recordings(self) -> int:
        """Number of recordings held."""
        return len(self._recordings)

    @property
    def reason(self) -> str | None:
        """Why the last step ran eagerly; ``None`` if it was replayed."""
        return self._reason if self._eager_in_a_row else None

    def _recorded(self, kind: Hashable, call: Call, as_it_is: Run, ledger: Ledger) -> tuple[Recording | None, str]:
        model = self._engine.model
        reason = self._refused.get(kind) or ledger.objection(kind) or obstacle_in(model, call.device)
        checkpointed = reason is None and checkpoints(model)
        if checkpointed and not self._routed and self._engine.keeps_random_states:
            reason = "gradient checkpointing restores a random state on the host"
        if reason is not None:
            ledger.took(replay=False)
            return None, reason
        if self._places is None:
            self._places = SharedPlaces(self._graphs(call.device))
        self._places.graphs.wait()  # for earlier steps, which are not part of what the capture costs
        began = ledger.now()
        sized, made = call.of_size(ledger.size(kind)), None
        try:
            made = recording = Recording(
                self._capturable, as_it_is, sized, model, self._places, may_draw=not checkpointed
            )
            recording.check_worth(_WORTH)
        except NotRecordedError as refusal:
            self._refuse(kind, str(refusal))
            return None, str(refusal)
        except RuntimeError as error:
            self._stopped = f"recording failed ({str(error).strip().splitlines()[0]})"
            self._forget()
            self._say(self._stopped, logging.WARNING)
            return None, self._stopped
        finally:
            times = {} if made is None else {"eager": made.eager_seconds, "replay": made.replay_seconds}
            ledger.captured(kind, began, **times)
        # After the first recording, which may be the first to run the model in training mode.
        self._state, self._stamp = self._state or ModelState(model), self._engine.seen
        self._drop(kind)  # one that is too small
        if len(self._recordings) >= MOST_RECORDINGS:
            self._drop(next(iter(self._recordings)))
        self._recordings[kind] = recording
        _logger.info(
            "cuda_graph='auto': recording %d of at most %d; they hold %.2f GB together",
            len(self._recordings),
            MOST_RECORDINGS,
            self._places.graphs.held_bytes / 1e9,
        )
        return recording, ""

    def _refuse(self, kind: Hashable, reason: str) -> None:
        self._refused[kind] = reason
        if not self._recordings:
            self._places = None  # a pool without a successful capture cannot be captured into again
        self._say(reason)

    def _drop(self, kind: Hashable) -> None:
        if kind in self._recordings and self._places is not None:
            self._places.graphs.wait()  # a graph must not be deleted while it runs
            del self._recordings[kind]

    @property
    def _routed(self) -> bool:
        """Whether layers with gradients run in routed passes, which have their own checkpointing."""
        return True

    def _capturable(self, call: Call) -> Outcome:
        with self._engine.capturable():
            return self._run(call)

    def _obstacle(self) -> str | None:
        """What currently prevents recording, besides the process and the arguments."""
        if self._places is not None and self._places.busy:
            return "the backward pass of an earlier step is still pending"
        return None

    def _untimed(self, reason: str) -> None:
        if self._ledger is not None:
            self._ledger.interrupt()
        self._as_it_is(reason)

    def _as_it_is(self, reason: str) -> None:
        self._reason = reason
        self._eager_in_a_row += 1
        if self._eager_in_a_row == _SAID_AFTER:
            self._say(reason)

    def _say(self, reason: str, level: int = logging.INFO) -> None:
        if reason not in self._said:
            self._said.add(reason)
            _logger.log(level, "cuda_graph='auto': steps run eagerly, because %s", reason)

    def _forget(self) -> None:
        if self._recordings and self._places is not None:
            self._places.graphs.wait()  # a graph must not be deleted while it runs
        self._recordings.clear()
        self._refused: dict[Hashable, str] = {}
        if self._ledger is not None:
            self._ledger.forget_kinds()
        # A pool cannot be captured into again once its recordings are gone.
        self._places = None
        self._state: ModelState | None = None
        self._stamp: Any = None


class StepRecorder(Recorder):
    """Replays training steps, whose keep ratio and draws are counted outside of them.

    Args:
        run: Runs a step eagerly.
        settings: Of the steps.
        engine: The passes over the model.
        schedule: Their keep ratio.
        draws: Numbers their random draws.
        device_type: Device type on which steps are recorded.
        graphs: Creates the recorder of a device.
        clock: Creates what times the steps of a device.
    """

    def __init__(
        self,
        run: Run,
        settings: RoutingSettings,
        engine: Engine,
        schedule: Schedule,
        draws: Draws,
        *,
        device_type: str = "cuda",
        graphs: Callable[[torch.device], Graphs] = CudaGraphs,
        clock: Callable[[torch.device], Clock] = CudaClock,
    ) -> None:
        super().__init__(run, engine, device_type=device_type, graphs=graphs, clock=clock)
        self._settings, self._schedule, self._draws = settings, schedule, draws

    def take_step(self, call: StepCall, router: Any, slots: Callable[[], int | None]) -> Outcome | None:
        """The step by replay; ``None`` if it must run eagerly.

        Args:
            call: The arguments.
            router: The source of scores.
            slots: Counts the slots of the supervised tokens, if those are kept. It may wait for the device, so it is
                called last.

        Raises:
            ValueError: As the step itself does.
        """
        if not isinstance(call.given["labels"], Tensor):
            self.replayed = False
            return None
        if not self.ready(call.device):
            return None
        reason = obstacle_of(router) or call.obstacle()
        if reason is not None:
            return self._untimed(reason)
        self._refresh()
        usual = call.with_slots(slots())
        return self._replayed(
            usual.in_bucket(),
            lambda fixed: self._run(fixed.with_slots(usual.given["slots"])),
            lambda: self._draws.next(call.device) if call.given["draw"] is None else call.given["draw"],
            self._schedule.ratio,
        )

    @property
    def _routed(self) -> bool:
        keeps_all = self._schedule.ratio == 1.0 and self._settings.selection != SUPERVISED
        return self._settings.routes_keys_and_values and not keeps_all

    def _obstacle(self) -> str | None:
        return "the keep ratio is changing" if self._schedule.moving else super()._obstacle()
