"""Whether a capture pays: what captures have cost so far, how long steps take, and what replays have saved.

Captures are rented or bought like skis: a kind of step is captured once its eager steps have lost about as much time as
the capture takes, and no earlier than replays have paid for the captures before. However a run goes on, captures then
cost it at most about the time of two.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

IN_A_ROW = 3
"""Equal steps in a row after which the first capture is made, to learn what a capture costs and saves."""
EAGER_STEPS = 12
"""Number of eager steps of a kind, in any order, after which it is made otherwise."""
_LEAST_SHARE = 0.1  # of the time of a step, that a capture is expected to save, whatever others have saved
_SHARE_FOR_TRIALS = 0.02  # of all time spent in steps, which captures may cost before replays have paid for it
_SAMPLES, _ENOUGH_SAMPLES = 9, 3
_MOST_KINDS = 256
_MOST_PENDING = 64

_TOO_RARE = "no kind of step (shapes, keep ratio) has occurred often enough to repay a capture"


class Clock(Protocol):
    """The interface for timing steps without waiting for the device."""

    def mark(self) -> Any:
        """A point in the work of the device."""
        ...

    def seconds(self, start: Any, end: Any) -> float | None:
        """Time between two marks; ``None`` if the device has not reached the second one."""
        ...

    def now(self) -> float:
        """Time of the host in seconds."""
        ...


@dataclass
class _Kind:
    count: int = 0  # eager steps since the last capture
    size: int = 0  # largest of a step
    eager: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))
    replays: deque[float] = field(default_factory=lambda: deque(maxlen=_SAMPLES))

    @property
    def saved(self) -> float | None:
        """Seconds that a replay saves; ``None`` if there are too few measurements."""
        if not self.eager or len(self.replays) < _ENOUGH_SAMPLES:
            return None
        return statistics.median(self.eager) - statistics.median(self.replays)


class Ledger:
    """Accounts of the time of captures and steps.

    A step is timed from its start to the start of the next one, with everything that a loop does in between.

    Args:
        clock: Times the steps.

    Attributes:
        spent: Seconds that captures have taken.
        saved: Seconds that replays have saved.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._kinds: dict[Hashable, _Kind] = {}
        self._started: tuple[Any, Hashable] | None = None
        self._replaying = self._timed = False
        self._pending: deque[tuple[Any, Any, Hashable, bool]] = deque(maxlen=_MOST_PENDING)
        self._last_kind: Hashable = None
        self._in_a_row = 0
        self._cost: float | None = None
        self._share = 0.0
        self._seconds = 0.0
        self.spent = self.saved = 0.0

    def start(self, kind: Hashable, size: int) -> None:
        """A step of a kind begins; ``size`` is what a recording of it must hold at least."""
        now = self._clock.mark()
        if self._started is not None and self._timed:
            self._pending.append((self._started[0], now, self._started[1], self._replaying))
        self._started, self._timed = (now, kind), False
        self._in_a_row = self._in_a_row + 1 if kind == self._last_kind else 1
        self._last_kind = kind
        if kind not in self._kinds and len(self._kinds) >= _MOST_KINDS:
            self._kinds.clear()
        known = self._kinds.setdefault(kind, _Kind())
        known.size = max(known.size, size)
        self._read_clock()

    def interrupt(self) -> None:
        """A step begins that is not of any kind."""
        self._started = None
        self._in_a_row = 0
        self._last_kind = None

    def took(self, *, replay: bool) -> None:
        """How the step runs that began last; not called for a step in which a capture is made or tried."""
        assert self._started is not None  # start was called
        self._timed, self._replaying = True, replay
        if not replay:
            self._kinds[self._started[1]].count += 1

    def now(self) -> float:
        """Time of the host in seconds, for :meth:`captured`."""
        return self._clock.now()

    def size(self, kind: Hashable) -> int:
        """The largest size of a kind's steps so far."""
        return self._kinds[kind].size

    def objection(self, kind: Hashable) -> str | None:
        """Why it is too early to capture a kind; ``None`` if it is time."""
        known = self._kinds[kind]
        if self._cost is None:
            # The step that asks is not counted yet.
            due = known.count >= EAGER_STEPS or (self._in_a_row > IN_A_ROW and known.count >= IN_A_ROW)
            return None if due else _TOO_RARE
        if known.count < IN_A_ROW or not known.eager:
            return _TOO_RARE
        lost = known.count * statistics.median(known.eager) * max(self._share, _LEAST_SHARE)
        if lost < self._cost:
            return _TOO_RARE
        if self.spent - self.saved > max(self._cost, _SHARE_FOR_TRIALS * self._seconds):
            return "replays have not saved the time yet that captures have cost"
        return None

    def captured(
        self, kind: Hashable, began: float, *, eager: float | None = None, replay: float | None = None
    ) -> None:
        """Account for a capture that was made or tried.

        Args:
            kind: Of the step.
            began: When, in the clock's time of the host.
            eager: Seconds of the step as it is, with its backward pass alone; ``None`` if it was not measured.
            replay: Seconds of the replay.
        """
        self._cost = self._clock.now() - began
        self.spent += self._cost
        if eager and replay is not None:
            self._share = 1 - replay / eager
        known = self._kinds.setdefault(kind, _Kind())
        known.count = 0
        known.replays.clear()

    def loses(self, kind: Hashable) -> bool:
        """Whether replays of a kind have turned out to be no faster than its eager steps, within the loop."""
        known = self._kinds.get(kind)
        if known is None or len(known.replays) < _SAMPLES or len(known.eager) < _ENOUGH_SAMPLES:
            return False
        return statistics.median(known.replays) > statistics.median(known.eager)

    def forget_kinds(self) -> None:
        """The model has changed, and with it the time of its steps; what captures cost and save is still known."""
        self._kinds.clear()
        self._pending.clear()
        self.interrupt()

    def _read_clock(self) -> None:
        while self._pending:
            start, end, kind, replay = self._pending[0]
            seconds = self._clock.seconds(start, end)
            if seconds is None:
                return
            self._pending.popleft()
            self._seconds += seconds
            known = self._kinds.get(kind)
            if known is None:
                continue
            (known.replays if replay else known.eager).append(seconds)
            if replay and (saved := known.saved) is not None:
                self.saved += saved
                self._share = saved / statistics.median(known.eager)
