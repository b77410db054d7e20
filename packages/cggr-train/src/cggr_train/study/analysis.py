"""Evaluates a study's records: losses at equal tokens, kept tokens and time, and differences to the controls."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cggr_train.study.arms import Arm
from cggr_train.study.intervals import Interval, interval
from cggr_train.study.plan import READINGS, Plan

PLACES = ("start", "end")
"""Where gradients are compared: at the weights that the standard run starts from, and at those it ends with."""


@dataclass(frozen=True)
class Comparison:
    """One arm in one reading.

    Attributes:
        loss: Held-out loss over seeds, nats per token.
        against: Difference to a control at the same seed (this arm minus the control), by the control's name. Arms
            share start, data order and held-out text at each seed, so differences vary less than losses. Controls that
            diverged are absent.
    """

    loss: Interval
    against: dict[str, Interval]


@dataclass(frozen=True)
class Outcome:
    """Everything shown in tables, plots and the verdict.

    Attributes:
        arms: In order.
        amounts: See :class:`cggr_train.study.plan.Plan`.
        step_seconds: Seconds of a step and its quartiles, by arm.
        memory: ``peak_bytes`` and ``start_bytes`` of each arm.
        engines: Engine of each routed arm.
        comparisons: For each reading (``tokens``, ``kept``, ``time``), the comparison of each arm that did not diverge.
        curves: For each arm the points of its runs, with ``seconds`` added; for a run that diverged, the points before.
        diverged: For each arm whose loss did not stay finite, the step at which it diverged, by seed.
        gradients: By place (``start``, ``end``), then by arm; see
            :func:`cggr_train.study.estimators.compare_gradients`.
        kept: See :func:`cggr_train.study.kept.kept_shares`.
        seeds: Runs of each arm.
        losses: For each reading, the held-out loss of each seed of each arm that did not diverge.
        accuracy: Share of the held-out questions that each seed of an arm answers at the end of its time; empty if none
            were asked.
        accuracy_after_tokens: The same at equal tokens seen.
        left_out: Why an arm that was planned is not compared, by its name.
        replayed: Whether an arm's step captures its passes as CUDA graphs by itself.
    """

    arms: list[Arm]
    amounts: dict[str, float]
    step_seconds: dict[str, tuple[float, float, float]]
    memory: dict[str, dict[str, int]]
    engines: dict[str, str]
    comparisons: dict[str, dict[str, Comparison]]
    curves: dict[str, list[list[dict[str, float]]]]
    gradients: dict[str, dict[str, dict[str, Any]]]
    kept: dict[str, dict[str, list[float | None]]]
    diverged: dict[str, dict[int, int]]
    seeds: int
    losses: dict[str, dict[str, list[float]]]
    accuracy: dict[str, list[float]]
    accuracy_after_tokens: dict[str, list[float]]
    left_out: dict[str, str]
    replayed: dict[str, bool]

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)


FURTHER_CONTROLS = ("standard-checkpointed", "standard-equal-memory")
"""Standard arms in the study that every other arm is compared with."""


def controls(arm: Arm) -> list[str]:
    """Names of the arms that an arm is compared with, each once: standard, random, and the same without FP8."""
    names = ["standard", *FURTHER_CONTROLS, arm.equal_cost, arm.random, arm.own_precision]
    return [name for name in dict.fromkeys(names) if name is not None and name != arm.name]


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return middle, low, high


def step_times(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Median and quartiles of each arm's seconds per step, over the turns in which it was timed."""
    samples: dict[str, list[float]] = {}
    for record in records:
        if record["event"] == "timing":
            samples.setdefault(record["arm"], []).extend(record["step_seconds"])
    return {name: quartiles(values) for name, values in samples.items()}


def analyse(
    arms: Sequence[Arm],
    plan: Plan,
    records: Sequence[Mapping[str, Any]],
    *,
    seeds: int,
    left_out: Mapping[str, str] | None = None,
) -> Outcome:
    """Combine a study's records.

    Args:
        arms: All arms.
        plan: Where curves are read.
        records: Of the study's log: ``timing``, ``run``, ``gradients`` and ``kept``; every run must be present.
        seeds: Runs of each arm.
        left_out: Why an arm that was planned is not among them.
    """
    times = step_times(records)
    present = {arm.name for arm in arms}
    runs = {
        (record["arm"], record["seed"]): record
        for record in records
        if record["event"] == "run" and record["arm"] in present
    }
    seed_numbers = sorted({seed for _, seed in runs})
    curves = {
        arm.name: [
            [{**point, "seconds": point["step"] * times[arm.name][0]} for point in runs[arm.name, seed]["points"]]
            for seed in seed_numbers
        ]
        for arm in arms
    }
    diverged: dict[str, dict[int, int]] = {}
    for (name, seed), run in runs.items():
        if "diverged" in run:
            diverged.setdefault(name, {})[seed] = run["diverged"]
    # the other seeds of such an arm are not compared either: they would be a biased sample
    whole = [arm for arm in arms if arm.name not in diverged]
    comparisons: dict[str, dict[str, Comparison]] = {}
    every: dict[str, dict[str, list[float]]] = {}
    for reading in READINGS:
        losses = {
            arm.name: [_loss_at(points, plan.readings[arm.name][reading]) for points in curves[arm.name]]
            for arm in whole
        }
        every[reading] = losses
        comparisons[reading] = {
            arm.name: Comparison(
                interval(losses[arm.name]),
                {
                    name: interval([own - other for own, other in zip(losses[arm.name], losses[name], strict=True)])
                    for name in controls(arm)
                    if name in losses
                },
            )
            for arm in whole
        }
    timings = [record for record in records if record["event"] == "timing"]
    # from the last turn: the first one also loads code and libraries
    memory = {record["arm"]: {key: record[key] for key in ("peak_bytes", "start_bytes")} for record in timings}
    return Outcome(
        arms=list(arms),
        amounts=dict(plan.amounts),
        step_seconds=times,
        memory=memory,
        engines={record["arm"]: record["engine"] for record in timings},
        comparisons=comparisons,
        curves=curves,
        gradients={place: found for place in PLACES if (found := _gradients_at(place, records))},
        kept=next((record["arms"] for record in records if record["event"] == "kept"), {}),
        diverged=diverged,
        seeds=seeds,
        losses=every,
        accuracy=_accuracies("time", whole, runs, seed_numbers),
        accuracy_after_tokens=_accuracies("tokens", whole, runs, seed_numbers),
        left_out=dict(left_out or {}),
        replayed={record["arm"]: record.get("replayed", False) for record in timings},
    )


def _accuracies(
    reading: str, arms: Sequence[Arm], runs: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int]
) -> dict[str, list[float]]:
    found = {arm.name: [runs[arm.name, seed].get("accuracy", {}).get(reading) for seed in seeds] for arm in arms}
    return {
        name: [asked["right"] / asked["questions"] for asked in every if asked is not None]
        for name, every in found.items()
        if None not in every
    }


def _gradients_at(place: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        record["arm"]: {name: record[name] for name in ("cosine", "variance", "bias")}
        for record in records
        if record["event"] == "gradients" and record["at"] == place
    }


def _loss_at(points: Sequence[Mapping[str, float]], step: int) -> float:
    return next(point["heldout_loss"] for point in points if point["step"] == step)
