"""Quality against peak memory of a study's arms at equal time, and the recommended one."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from cggr_train.study.intervals import Interval, interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cggr_train.study.analysis import Outcome

LESS_MEMORY = 0.95
"""A peak counts as smaller than another if it is at most this share of it: allocators round."""


class Point(NamedTuple):
    """An arm at the end of the time that all arms get.

    Attributes:
        name: Of the arm.
        quality: Held-out loss over seeds, or the accuracy if questions were asked.
        cost: For each seed, lower is better: the loss, or the negated accuracy.
        peak_bytes: Peak memory of its step.
    """

    name: str
    quality: Interval
    cost: tuple[float, ...]
    peak_bytes: int

    @property
    def mean_cost(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.cost)  # as in intervals, so that equal means stay equal


def measured_by_accuracy(outcome: Outcome) -> bool:
    """Whether arms are compared by their answers instead of their loss: if any answer was right."""
    return any(any(shares) for shares in outcome.accuracy.values())


def points(outcome: Outcome) -> list[Point]:
    """Every arm that did not diverge, in the order of the study: simpler ones first."""
    found = []
    for arm in outcome.arms:
        if arm.name not in outcome.losses["time"]:
            continue
        samples, cost = outcome.losses["time"][arm.name], outcome.losses["time"][arm.name]
        if measured_by_accuracy(outcome):
            samples = outcome.accuracy[arm.name]
            cost = [-share for share in samples]
        found.append(Point(arm.name, interval(samples), tuple(cost), outcome.memory[arm.name]["peak_bytes"]))
    return found


def non_dominated(every: Sequence[Point]) -> list[Point]:
    """The Pareto-optimal points, sorted by memory.

    Example:
        >>> none = Interval(0.0, None, None)
        >>> every = [Point("a", none, (2.0,), 8), Point("b", none, (2.5,), 4), Point("c", none, (2.6,), 5)]
        >>> [point.name for point in non_dominated(every)]
        ['b', 'a']
    """
    return sorted(
        (
            point
            for point in every
            if not any(
                other.mean_cost <= point.mean_cost
                and other.peak_bytes <= point.peak_bytes
                and (other.mean_cost, other.peak_bytes) != (point.mean_cost, point.peak_bytes)
                for other in every
            )
        ),
        key=lambda point: (point.peak_bytes, point.mean_cost),
    )


def recommended(every: Sequence[Point]) -> Point:
    """The arm to use: among those that no other is shown to beat, the one with the least memory, or else the simplest.

    Args:
        every: Simpler arms first.
    """
    unbeaten = [point for point in every if not any(_is_cheaper(other, point) for other in every)]
    least = min(point.peak_bytes for point in unbeaten)
    return next(point for point in unbeaten if LESS_MEMORY * point.peak_bytes <= least)


def is_chosen_for_memory(every: Sequence[Point], chosen: Point, best: Point) -> bool:
    """Whether ``chosen`` is preferred to ``best`` because it takes less memory, rather than because it is simpler.

    Args:
        every: Simpler arms first.
        chosen: The recommended one.
        best: The one with the best quality.
    """
    if chosen.peak_bytes <= LESS_MEMORY * best.peak_bytes:
        return True
    return [point.name for point in every].index(chosen.name) > [point.name for point in every].index(best.name)


def with_less_memory(every: Sequence[Point], chosen: Point) -> list[Point]:
    """Points of the frontier that need less memory than ``chosen``, the largest first."""
    return [point for point in reversed(non_dominated(every)) if point.peak_bytes <= LESS_MEMORY * chosen.peak_bytes]


def _is_cheaper(one: Point, other: Point) -> bool:
    """Whether the difference, paired by seed, is significantly in favour of ``one``."""
    return interval([own - its for own, its in zip(one.cost, other.cost, strict=True)]).sign < 0
