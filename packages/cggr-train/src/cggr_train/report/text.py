"""Human-readable figures of a study."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cggr_train.study.intervals import Interval


def duration(seconds: float) -> str:
    """A time in a suitable unit.

    Example:
        >>> duration(0.0123), duration(0.5), duration(1.634), duration(75.0)
        ('12.3 ms', '500 ms', '1.63 s', '75.0 s')
    """
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:,.1f} s"


def count(number: float) -> str:
    """A number of tokens.

    Example:
        >>> count(950), count(12_345), count(3_200_000)
        ('950', '12k', '3.20M')
    """
    if number >= 1_000_000:
        return f"{number / 1e6:.2f}M"
    return f"{number / 1e3:.0f}k" if number >= 10_000 else f"{number:,.0f}"


def loss(value: Interval) -> str:
    """A loss and half its confidence interval.

    Example:
        >>> from cggr_train.study.intervals import Interval
        >>> loss(Interval(2.5, 2.4, 2.6)), loss(Interval(2.5, None, None))
        ('2.500 ±0.100', '2.500')
    """
    return f"{value.mean:.3f}" if value.high is None else f"{value.mean:.3f} ±{value.high - value.mean:.3f}"


def difference(value: Interval | None) -> str:
    """A difference with its interval; empty if there is nothing to compare with.

    Example:
        >>> from cggr_train.study.intervals import Interval
        >>> difference(Interval(-0.1, -0.15, -0.05)), difference(None)
        ('-0.100 (-0.150 to -0.050)', '')
    """
    if value is None:
        return ""
    if value.low is None:
        return f"{value.mean:+.3f}"
    return f"{value.mean:+.3f} ({value.low:+.3f} to {value.high:+.3f})"


def against(value: Interval, label: str) -> str:
    """A loss compared with a control's.

    Example:
        >>> from cggr_train.study.intervals import Interval
        >>> against(Interval(-0.1, -0.15, -0.05), "standard")
        '0.100 better than standard (95% interval 0.050 to 0.150)'
        >>> against(Interval(0.1, -0.05, 0.25), "standard")
        'indistinguishable from standard (+0.100, 95% interval -0.050 to +0.250)'
    """
    if value.low is None or value.high is None:
        return f"{abs(value.mean):.3f} {'above' if value.mean > 0 else 'below'} {label} (one seed: no interval)"
    if value.sign == 0:
        return f"indistinguishable from {label} ({value.mean:+.3f}, 95% interval {value.low:+.3f} to {value.high:+.3f})"
    low, high = sorted((abs(value.low), abs(value.high)))
    word = "worse" if value.sign > 0 else "better"
    return f"{abs(value.mean):.3f} {word} than {label} (95% interval {low:.3f} to {high:.3f})"
