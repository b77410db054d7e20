"""When a capture pays: runs of a loop under a clock that the test moves, and never slower than eager ones by much."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cggr_core.recording import recorder
from cggr_core.recording.ledger import EAGER_STEPS, IN_A_ROW, Ledger
from tests.support.model_steps import backward, tokens
from tests.support.recorded_steps import recording_model, replayed
from tests.support.tiny_models import ROUTABLE


class HandMovedClock:
    """Stands still unless it is moved."""

    def __init__(self) -> None:
        self.time = 0.0

    def mark(self) -> float:
        return self.time

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def now(self) -> float:
        return self.time


class Loop:
    """Steps of numbered kinds, captured when the ledger has no objection.

    Args:
        eager: Seconds of an eager step.
        replay: Seconds of a replay.
        capture: Seconds of a capture.
        expected: Seconds of a replay as a capture finds it.
        refused: Whether captures are refused.
    """

    def __init__(
        self, eager: float, replay: float, capture: float, *, expected: float | None = None, refused: bool = False
    ) -> None:
        self.clock = HandMovedClock()
        self.ledger = Ledger(self.clock)
        self.eager, self.replay, self.capture, self.refused = eager, replay, capture, refused
        self.expected = replay if expected is None else expected
        self.held: set[int] = set()
        self.captures: list[int] = []
        self.steps = 0

    def step(self, kind: int) -> str:
        """Take a step; returns how it ran."""
        ledger, clock = self.ledger, self.clock
        self.steps += 1
        ledger.start(kind, 0)
        if kind in self.held and ledger.loses(kind):
            self.held.remove(kind)
        if kind in self.held:
            ledger.took(replay=True)
            clock.time += self.replay
            return "replay"
        if ledger.objection(kind) is not None:
            ledger.took(replay=False)
            clock.time += self.eager
            return "eager"
        began = ledger.now()
        clock.time += self.capture
        ledger.captured(kind, began, eager=self.eager, replay=self.expected)
        self.captures.append(kind)
        if self.refused:
            clock.time += self.eager
        else:
            self.held.add(kind)
            clock.time += self.replay
        return "capture"

    @property
    def behind(self) -> float:
        """Seconds behind a run of eager steps."""
        return self.clock.time - self.steps * self.eager


def test_equal_steps_are_captured_after_a_few():
    loop = Loop(1.0, 0.5, 6.0)
    assert [loop.step(0) for _ in range(6)] == ["eager"] * IN_A_ROW + ["capture", "replay", "replay"]


def test_a_first_capture_of_steps_in_turns_needs_more_of_them():
    loop = Loop(1.0, 0.5, 6.0)
    assert [loop.step(step % 2) for step in range(2 * EAGER_STEPS)] == ["eager"] * 2 * EAGER_STEPS
    assert loop.step(0) == "capture"


def test_a_second_kind_is_captured_once_its_eager_steps_have_lost_a_capture():
    """A capture of 6 s that saves 0.5 s per step is worth 12 steps."""
    loop = Loop(1.0, 0.5, 6.0)
    for _ in range(60):
        loop.step(0)
    assert [loop.step(1) for _ in range(13)] == ["eager"] * 12 + ["capture"]


def test_a_capture_waits_until_the_ones_before_are_paid():
    loop = Loop(1.0, 0.5, 6.0)
    for kind in range(4):
        for _ in range(IN_A_ROW + 1):
            loop.step(kind)
    assert loop.captures == [0]
    for _ in range(20):
        for kind in range(1, 4):
            loop.step(kind)
    assert loop.captures == [0, 1]
    for _ in range(60):
        for kind in range(4):
            loop.step(kind)
    assert loop.captures == [0, 1, 2, 3]


def test_kinds_that_are_all_rare_stay_eager():
    loop = Loop(1.0, 0.1, 6.0)
    assert {loop.step(step % 50) for step in range(50 * EAGER_STEPS)} == {"eager"}


def test_captures_that_are_refused_are_not_tried_often():
    loop = Loop(1.0, 0.95, 6.0, refused=True)
    for step in range(600):
        loop.step(step // 100)
    assert len(loop.captures) <= 3
    assert loop.behind <= 0.05 * 600


def test_replays_that_are_slower_in_the_loop_are_given_up():
    """Alone, a replay took half the time; within the loop, the device was never waiting."""
    loop = Loop(1.0, 1.2, 6.0, expected=0.5)
    found = [loop.step(0) for _ in range(40)]
    assert found.count("replay") <= 12
    assert found[-1] == "eager"


@settings(max_examples=60, deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=40),
    share=st.floats(0.0, 0.95),
    capture=st.floats(0.5, 30.0),
    expected=st.floats(0.05, 1.0),
)
def test_a_run_is_never_behind_by_more_than_two_captures(runs, share, capture, expected):
    loop = Loop(1.0, 1.0 - share, capture, expected=expected)
    for kind, count in runs:
        for _ in range(count):
            loop.step(kind)
            assert loop.behind <= 2 * capture + 0.02 * loop.clock.time + 1e-9


def test_a_step_that_is_not_counted_ends_the_time_of_the_one_before():
    clock = HandMovedClock()
    ledger = Ledger(clock)
    for long in (1.0, 100.0, 1.0, 1.0):
        ledger.start("kind", 0)
        ledger.took(replay=False)
        clock.time += long
        if long > 1.0:
            ledger.interrupt()
    ledger.start("kind", 0)
    assert list(ledger._kinds["kind"].eager) == [1.0, 1.0, 1.0]


@pytest.fixture
def clock(monkeypatch):
    """A model's steps take as long as the test says, and captures are kept."""
    made = HandMovedClock()
    monkeypatch.setattr("tests.support.recorded_steps.HostClock", lambda device: made)
    monkeypatch.setattr(recorder, "_WORTH", 1e9)
    return made


def steps(model, clock, count: int, seconds: float, length: int = 12) -> list[bool]:
    found = []
    for seed in range(count):
        backward(model, tokens(length=length, seed=seed))
        clock.time += seconds
        found.append(replayed(model))
    return found


def test_a_models_steps_are_captured_after_a_few_in_a_row(clock):
    model = recording_model(ROUTABLE["llama"](), selection="random")
    assert steps(model, clock, 6, 1.0)[-3:] == [False, True, True]


def test_a_models_replays_that_are_slower_in_the_loop_are_given_up(clock):
    model = recording_model(ROUTABLE["llama"](), selection="random")
    steps(model, clock, 5, 1.0)
    assert steps(model, clock, 12, 1.1)[-1] is False
    assert model._recorder.reason == "in this loop, replayed steps take longer than eager ones"
    assert model._recorder.recordings == 0


def test_a_model_that_keeps_changing_is_left_alone(clock, monkeypatch):
    """Each capture takes 6 s, and few replays follow it before the next change."""
    capture = recorder.Recording

    def slow(*args, **more):
        clock.time += 6.0
        made = capture(*args, **more)
        made.eager_seconds, made.replay_seconds = 1.0, 0.5
        return made

    monkeypatch.setattr(recorder, "Recording", slow)
    model = recording_model(ROUTABLE["llama"](), selection="random")
    ledger = None
    for _ in range(8):
        steps(model, clock, 6, 1.0)
        ledger = model._recorder._ledger
        model.model.lm_head.weight.data = model.model.lm_head.weight.data.clone()
    assert ledger.spent <= 12.0
    assert steps(model, clock, 30, 1.0)[:9] == [False] * 9
