"""Confidence intervals of means from a few seeds: Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

LEVEL = 0.95


class Interval(NamedTuple):
    """A mean and its confidence interval.

    Attributes:
        mean: Mean of the samples.
        low: Lower end; None for a single sample.
        high: Upper end, likewise.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def sign(self) -> int:
        """−1 if the whole interval is below zero, 1 if above, 0 if it contains zero or is unknown."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


def interval(samples: Sequence[float]) -> Interval:
    """Mean of ``samples`` with its 95% confidence interval, for independent, approximately normal samples.

    Raises:
        ValueError: If there are no samples.

    Example:
        >>> interval([1.0, 2.0, 3.0])
        Interval(mean=2.0, low=-0.484..., high=4.484...)
    """
    if not samples:
        raise ValueError("samples is empty; give at least one number")
    mean = statistics.fmean(samples)
    if len(samples) == 1:
        return Interval(mean, None, None)
    half = student_t(LEVEL, len(samples) - 1) * statistics.stdev(samples) / math.sqrt(len(samples))
    return Interval(mean, mean - half, mean + half)


def student_t(level: float, degrees: int) -> float:
    """The t with ``P(|T| < t) = level`` for ``degrees`` degrees of freedom.

    Source: Abramowitz and Stegun, *Handbook of Mathematical Functions*, 26.7.3 and 26.7.4 (the distribution in closed
    form), solved by bisection.

    Example:
        >>> round(student_t(0.95, 2), 3)
        4.303
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _central_probability(middle, degrees) < level else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _central_probability(theta: float, degrees: int) -> float:
    """P(|T| < t) with ``theta = atan(t / sqrt(degrees))``."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (theta + (sine * total if degrees > 1 else 0.0))
