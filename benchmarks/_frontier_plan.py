"""How many steps every arm of `benchmarks.frontier` takes, and after which it is evaluated."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from typing import Any

from benchmarks._frontier_arms import SETTINGS, Setting

CURVE = (1 / 8, 1 / 4, 1 / 2)
"""Further points of a curve, as shares of its steps."""


def steps_at(setting: Setting, times: dict[str, float], budget: float, share: float) -> dict[str, int]:
    """Steps of each arm after a share of the common time."""
    return {name: max(1, round(share * budget / times[name])) for name in setting.arms}


def with_arms(setting: Setting, names: Collection[str]) -> Setting:
    """The setting with only some of its arms, and their ways."""
    arms = {name: arm for name, arm in setting.arms.items() if name in names}
    left = {arm.way for arm in arms.values()}
    ways = {name: way for name, way in setting.ways.items() if name in left}
    return dataclasses.replace(setting, arms=arms, ways=ways)


def setting_of(arguments: argparse.Namespace) -> Setting:
    """The setting as requested on the command line."""
    setting = SETTINGS[arguments.setting]
    if arguments.only:
        if unknown := sorted(set(arguments.only) - set(setting.ways)):
            raise SystemExit(f"--only takes ways of {arguments.setting}: {', '.join(setting.ways)}; not {unknown}")
        setting = with_arms(setting, [name for name, arm in setting.arms.items() if arm.way in arguments.only])
    return setting


def time_of(record: dict[str, Any], kind: str) -> float | None:
    """Seconds of a step, if it has been timed."""
    return record.get(kind, {}).get("seconds")


class Plan:
    """The number of steps of every arm, from their times.

    Args:
        setting: The setting.
        timings: Records of :func:`benchmarks._frontier_training.time_arm`, by arm.
        seconds: Of every run, instead of the setting's.
        steps: Of the clock arm, instead of the setting's.
        answers: The readings at which test problems are answered: ``"all"``, or ``"equal"`` for only those after equal
            examples.

    Attributes:
        times: Time of a recorded step, if it could be recorded.
        usual: Time of a step as it runs by default: eagerly for the standard one, as ``CGGRModel`` takes it for routed
            ones.
        budget: Seconds that every arm gets.
        steps: By share of the budget, then by arm.
        equal: By arm, the steps after which all arms have seen as many examples.
        points: By way.
    """

    def __init__(
        self, setting: Setting, timings: dict[str, Any], *, seconds: float | None = None, steps: int | None = None,
        answers: str = "all",
    ) -> None:  # fmt: skip
        self.setting, self.answers = setting, answers
        self.times, self.usual = {}, {}
        for name in setting.arms:
            found = timings[name]
            eager = time_of(found, "eager")
            self.times[name] = time_of(found, "recorded") or eager
            routed = setting.ways[setting.arms[name].way].gradient != "exact"
            self.usual[name] = min(filter(None, (eager, time_of(found, "itself")))) if routed else eager
        for name, arm in setting.arms.items():
            if arm.counted:
                for times in (self.times, self.usual):
                    times[name] = sum(share * times[other] for other, share in arm.counted)
        clock = self.times[setting.clock]
        count = steps or setting.steps
        if seconds is None and count is not None:
            self.budget = count * clock
        else:
            self.budget = seconds or setting.seconds or 0.0
        self.steps = {share: steps_at(setting, self.times, self.budget, share) for share in setting.shares}
        self.usual_steps = {share: steps_at(setting, self.usual, self.budget, share) for share in setting.shares}
        batches = {name: setting.ways[arm.way].batch for name, arm in setting.arms.items()}
        last = self.steps[setting.shares[-1]]
        examples = min(last[name] * batches[name] for name in setting.arms)
        self.equal = {name: max(1, examples // batches[name]) for name in setting.arms}
        self.points = {way: self._points(way) for way in setting.ways}

    def _points(self, way: str) -> list[int]:
        arms = [name for name, arm in self.setting.arms.items() if arm.way == way]
        read = {self.equal[name] for name in arms}
        for by_share in (self.steps, self.usual_steps):
            read |= {steps[name] for steps in by_share.values() for name in arms}
        last = self.setting.shares[-1]
        most = max(max(self.steps[last][name], self.usual_steps[last][name]) for name in arms)
        spread = {max(1, round(most * share)) for share in CURVE}
        spread = {point for point in spread if all(abs(point - other) > 0.2 * other for other in read)}
        return sorted(point for point in read | spread if point <= most)

    def answered_at(self, way: str) -> dict[str, int]:
        """The steps after which a way answers test problems, by the name of the reading."""
        found = {}
        for name, arm in self.setting.arms.items():
            # Of the arms that share the clock's run, only this one.
            if arm.way == way and (name == self.setting.clock or way != self.setting.arms[self.setting.clock].way):
                if self.answers == "all":
                    found |= {f"{name}, {share:.2f}": steps[name] for share, steps in self.steps.items()}
                found[f"{name}, equal examples"] = self.equal[name]
        return found
