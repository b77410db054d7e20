import copy
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cggr_core.schedule import Schedule

ratios = st.floats(0.01, 1.0)


def test_curriculum_by_hand():
    schedule = Schedule(min_tokens_ratio=0.2, warmup_steps=4)
    seen = []
    for _ in range(6):
        seen.append(round(schedule.ratio, 10))
        schedule.step()
    assert seen == [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]


def test_without_a_warmup_it_starts_at_its_ratio():
    assert Schedule(min_tokens_ratio=0.3).ratio == 0.3
    assert not Schedule().moving


def test_dynamic_ratio_by_hand():
    schedule = Schedule(min_tokens_ratio=0.25, dynamic_threshold=True, threshold_sensitivity=1.0)
    assert schedule.ratio == 0.25
    schedule.observe(0.5)
    assert schedule.ratio == 0.25
    schedule.observe(0.1)
    assert schedule.ratio == pytest.approx(0.25 * math.exp(0.4))
    schedule.observe(0.9)
    assert schedule.ratio == pytest.approx(0.25 * math.exp(-0.4))
    schedule.observe(None)
    schedule.observe(float("nan"))
    assert schedule.ratio == pytest.approx(0.25 * math.exp(-0.4))


@given(ratios, st.floats(0, 100), st.floats(0, 1), st.integers(0, 12))
def test_dynamic_ratio_is_bounded_and_falls_with_confidence(ratio, sensitivity, confidence, steps):
    def at(value):
        schedule = Schedule(
            min_tokens_ratio=ratio, warmup_steps=10, dynamic_threshold=True, threshold_sensitivity=sensitivity
        )
        for _ in range(steps):
            schedule.step()
        schedule.observe(value)
        return schedule.ratio, schedule.curriculum_ratio

    got, base = at(confidence)
    assert base / 2 - 1e-12 <= got <= min(1.0, 2 * base) + 1e-12
    assert at(0.0)[0] >= got >= at(1.0)[0]
    if sensitivity == 0:
        assert got == base


@given(ratios, st.integers(0, 5000))
def test_capacity_at_rest_is_the_ceiling(ratio, length):
    capacity = Schedule(min_tokens_ratio=ratio).capacity(length)
    assert min(length, 1) <= capacity <= length
    assert capacity >= ratio * length - 1e-6
    assert capacity <= max(1, ratio * length + 1) or capacity == length


def test_capacity_by_hand():
    assert Schedule(min_tokens_ratio=0.25).capacity(512) == 128
    assert Schedule(min_tokens_ratio=0.07).capacity(100) == 7  # 0.07 * 100 is 7.000000000000001
    assert Schedule(min_tokens_ratio=0.25).capacity(0) == 0


def test_capacity_repeats_while_the_ratio_moves():
    schedule = Schedule(min_tokens_ratio=0.25, warmup_steps=1000)
    seen = set()
    for _ in range(1000):
        capacity = schedule.capacity(640)
        assert capacity % 20 == 0
        assert capacity >= schedule.ratio * 640 - 1e-6
        seen.add(capacity)
        schedule.step()
    assert len(seen) <= 25
    assert schedule.capacity(640) == 160


def test_state_round_trip():
    schedule = Schedule(warmup_steps=10, dynamic_threshold=True)
    for _ in range(3):
        schedule.next_draw()
        schedule.step()
    schedule.observe(0.7)
    other = Schedule(warmup_steps=10, dynamic_threshold=True)
    other.load_state_dict(schedule.state_dict())
    assert (other.ratio, other.next_draw(), other.steps) == (schedule.ratio, 3, 3)
    assert other.next_draw_tensor() == 4
    assert other.next_draw() == 5
    assert all(type(value) in (int, float) for value in schedule.state_dict().values())
    assert copy.deepcopy(schedule).next_draw() == schedule.next_draw() == 3


@pytest.mark.parametrize("state", [{}, {"steps": 1, "draws": 1, "confidence": None, "more": 1}])
def test_a_state_with_other_keys_changes_nothing(state):
    schedule = Schedule()
    schedule.step()
    with pytest.raises(ValueError, match=r"state must have the keys \['confidence', 'draws', 'steps'\], got"):
        schedule.load_state_dict(state)
    assert schedule.steps == 1


def test_a_state_whose_confidence_is_no_number_changes_nothing():
    schedule = Schedule()
    with pytest.raises(TypeError, match=r"state\['confidence'\] must be a number, got 'high'"):
        schedule.load_state_dict({"steps": 3, "draws": 1, "confidence": "high"})
    assert schedule.steps == 0


def test_one_warning_after_100_forwards_of_a_warmup_without_a_step():
    schedule = Schedule(warmup_steps=10)
    for _ in range(99):
        schedule.note_forward()
    with pytest.warns(UserWarning, match=r"warmup_steps=10, but step\(\) was not called in 100 training forwards"):
        schedule.note_forward()
    for _ in range(200):
        schedule.note_forward()  # a second warning would be an error
    for stepped in (Schedule(), Schedule(warmup_steps=10)):
        stepped.step()
        for _ in range(200):
            stepped.note_forward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_tokens_ratio": 0.0}, r"min_tokens_ratio must be in \(0, 1\], got 0.0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0, got -1"),
        ({"threshold_sensitivity": -0.5}, "threshold_sensitivity must be a finite number of at least 0, got -0.5"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


def test_repr():
    assert "ratio 0.25" in repr(Schedule())
