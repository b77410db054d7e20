"""A study's plots, as PNG bytes for its page."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cggr_train.report.curves import FAINT, INK, new_figure
from cggr_train.study.frontier import measured_by_accuracy, non_dominated, points
from cggr_train.study.intervals import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cggr_train.study.analysis import Outcome
    from cggr_train.study.arms import Arm

COLOURS = (
    INK, "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#7b4ab5", "#a0522d", "#b3a000", "#7f7f7f",
)  # fmt: skip
"""One per arm, mostly from the colour-blind-safe Okabe-Ito palette."""
SHADES = ((0.0, 1.0), (0.4, 0.0), (0.4, 1.0), (0.65, 0.0), (0.65, 1.0))
"""With more arms than colours, colours repeat with this much black (0) or white (1) mixed in."""
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (8, 2, 2, 2)), (0, (1, 1)))
"""Line styles of these shades."""
WIDE, NARROW = 10.0, 4.6
"""Width in inches for a page on a screen and on a phone: text keeps its size."""
_BREAK = (": ", "\n")


def draw_losses(outcome: Outcome, *, width: float = WIDE) -> bytes:
    """Held-out loss over training time: one panel for each gradient mode and ratio, with its controls.

    Curves are labelled directly. A diverged arm is drawn up to that point, as far as it fits.
    """
    return _draw_curves(
        outcome, width, "training time, seconds (steps times time per step)", outcome.amounts["time"],
        lambda point: point["seconds"],
    )  # fmt: skip


def draw_losses_by_tokens(outcome: Outcome, *, width: float = WIDE) -> bytes:
    """The same curves over the tokens seen."""
    return _draw_curves(
        outcome, width, "thousand tokens seen", outcome.amounts["tokens"] / 1000, lambda point: point["tokens"] / 1000
    )


def draw_frontier(outcome: Outcome, *, width: float = WIDE) -> bytes:
    """Quality in the same time against peak memory: one point for each arm, the non-dominated ones joined."""
    every = points(outcome)
    with new_figure(width, 4.6) as figure:
        axes = figure.subplots()
        scale = 100 if measured_by_accuracy(outcome) else 1
        for point in every:
            arm, found = outcome.arm(point.name), point.quality
            ends = [[0.0], [0.0]]
            if found.low is not None and found.high is not None:
                ends = [[scale * (found.mean - found.low)], [scale * (found.high - found.mean)]]
            axes.errorbar(
                point.peak_bytes / 2**30, scale * found.mean, yerr=ends, color=colour(arm, outcome), marker="o",
                capsize=3, linewidth=1.2,
            )  # fmt: skip
        best = non_dominated(every)
        x, y = ([p.peak_bytes / 2**30 for p in best], [scale * p.quality.mean for p in best])
        axes.plot(x, y, color=FAINT, linewidth=1.2, zorder=0)
        what = "Right answers, %" if measured_by_accuracy(outcome) else "Held-out loss, nats per token"
        axes.set_title(f"{what}{_BREAK[width <= NARROW]}after the same time")
        axes.set_xlabel("peak memory per step, GiB")
        ends_of = {p.name: (p.peak_bytes / 2**30, scale * p.quality.mean) for p in every}
        _name_curves(axes, outcome, ends_of, width)
        return _png(figure)


def draw_kept(outcome: Outcome, *, width: float = WIDE) -> bytes | None:
    """Kept share by place in the sequence, by token frequency and by score: one row for each ratio.

    None if all arms keep the same shares, so that there is nothing to show.
    """
    rows: dict[float, dict[str, Arm]] = {}
    for arm in outcome.arms:
        if arm.name in outcome.kept:
            # the gradient mode does not affect the selection
            key = arm.label.split(",")[0]
            rows.setdefault(arm.routing.ratio, {}).setdefault(key, arm)
    titles = {
        "position": ("kept by place", "first tenth of the sequence … last"),
        "frequency": ("by token frequency", "rarest tenth … most frequent"),
        "score": ("by score", "lowest tenth … highest"),
    }
    titles = {name: words for name, words in titles.items() if _shares_differ(outcome, name)}
    if not titles:
        return None
    across = len(titles) if width > NARROW else 1
    down = len(rows) * len(titles) // across
    with new_figure(width, 0.6 + 2.8 * down) as figure:
        grid = figure.subplots(down, across, squeeze=False, sharey=True).reshape(len(rows), len(titles))
        for row, (ratio, arms) in zip(grid, sorted(rows.items()), strict=True):
            for axes, (name, (title, ends)) in zip(row, titles.items(), strict=True):
                for label, arm in arms.items():
                    shares = [math.nan if share is None else 100 * share for share in outcome.kept[arm.name][name]]
                    axes.plot(range(1, len(shares) + 1), shares, marker=".", label=label, **line(arm, outcome))
                axes.set_xlabel(ends)
                axes.set_xticks([])
                axes.set_title(title if name != next(iter(titles)) else f"Ratio {ratio:g}: {title}", fontsize=10)
            highest = max(max(_known(outcome.kept[arm.name][name])) for arm in arms.values() for name in titles)
            row[0].set_ylim(0, 100 * max(1.05 * highest, 0.01))
            row[0].set_ylabel("kept, %")
            row[0].legend(fontsize=8)
        return _png(figure)


def _groups(outcome: Outcome) -> list[tuple[str, list[Arm]]]:
    """Routed arms of one gradient mode and ratio, with the standard arms they are compared with."""
    standard = [arm for arm in outcome.arms if arm.role in ("standard", "batch", "checkpointed", "equal_memory")]
    groups: dict[tuple[str, float], list[Arm]] = {}
    for arm in outcome.arms:
        if arm.method != "standard":
            groups.setdefault((arm.routing.gradient, arm.routing.ratio), []).append(arm)
    found = []
    for (gradient, ratio), arms in groups.items():
        equal = dict.fromkeys(arm.equal_cost for arm in arms if arm.equal_cost != "standard")
        controls = [*standard, *(outcome.arm(name) for name in equal)]
        found.append((f"{gradient}, keep ratio {ratio:g}", [*controls, *arms]))
    return found or [("standard", outcome.arms)]


def _draw_curves(
    outcome: Outcome, width: float, unit: str, read_at: float, where: Callable[[dict[str, float]], float]
) -> bytes:
    groups = _groups(outcome)
    with new_figure(width, 0.4 + 4.6 * len(groups)) as figure:
        grid = figure.subplots(len(groups), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
        later: list[float] = []
        for axes, (title, arms) in zip(grid, groups, strict=True):
            ends = {}
            for arm in arms:
                # for a diverged arm, as far as every seed got
                across = list(zip(*outcome.curves[arm.name], strict=arm.name not in outcome.diverged))
                x = [statistics.fmean(where(point) for point in points) for points in across]
                found = [interval([point["heldout_loss"] for point in points]) for points in across]
                means = [value.mean for value in found]
                axes.plot(x, means, label=_name(arm, outcome), marker="o", markersize=3, **line(arm, outcome))
                if found[0].low is not None:
                    low, high = ([value.low for value in found], [value.high for value in found])
                    shade: Any = {"color": colour(arm, outcome), "alpha": 0.12, "linewidth": 0}
                    axes.fill_between(x, low, high, **shade)
                if arm.name not in outcome.diverged:
                    # the untrained model, first of each curve, would squeeze the rest
                    later += [end for value in found[1:] for end in value if end is not None]
                ends[arm.name] = (x[-1], means[-1])
            axes.set_title(f"{title}{_BREAK[width <= NARROW]}held-out loss, nats per token")
            axes.axvline(read_at, color=FAINT, linewidth=1, linestyle=":")
            _name_curves(axes, outcome, ends, width)
            axes.tick_params(labelbottom=True)
        grid[-1].set_xlabel(unit)
        room = 0.04 * (max(later) - min(later)) + 0.01
        grid[0].set_ylim(min(later) - room, max(later) + room)
        return _png(figure)


def _name(arm: Arm, outcome: Outcome) -> str:
    return f"{arm.title} (diverged)" if arm.name in outcome.diverged else arm.title


def _name_curves(axes: Axes, outcome: Outcome, ends: dict[str, tuple[float, float]], width: float) -> None:
    """Write the arms' names at the ends of their curves without overlap, or below the plot on a narrow page."""
    if width <= NARROW:
        for name in ends:
            axes.plot([], [], label=_name(outcome.arm(name), outcome), **line(outcome.arm(name), outcome))
        known = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        axes.legend(known.values(), known.keys(), fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16))
        return
    order = sorted(ends, key=lambda name: -ends[name][1])
    for place, name in enumerate(order):
        arm = outcome.arm(name)
        height = 1.0 - (place + 0.5) / len(order)
        axes.annotate(
            _name(arm, outcome), ends[name], xytext=(1.03, height), textcoords=axes.transAxes, va="center",
            fontsize=9, fontweight="bold", color=colour(arm, outcome),
            arrowprops={
                "arrowstyle": "-", "color": colour(arm, outcome), "linewidth": 0.8, "alpha": 0.6, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _shares_differ(outcome: Outcome, what: str) -> bool:
    """Whether some arm keeps clearly different shares of the tenths of the tokens by this measure."""
    return any(max(_known(by[what])) - min(_known(by[what])) > 0.05 for by in outcome.kept.values())


def _known(shares: list[float | None]) -> list[float]:
    """Shares of the bins that have countable tokens; 0 where none has, so that there is always one."""
    return [share for share in shares if share is not None] or [0.0]


def colour(arm: Arm, outcome: Outcome) -> str:
    """The arm's own colour in every plot of the study."""
    again, number = divmod(_place(arm, outcome), len(COLOURS))
    share, towards = SHADES[again % len(SHADES)]
    channels = (int(COLOURS[number][at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round((1 - share) * value + 255 * share * towards):02x}" for value in channels)


def line(arm: Arm, outcome: Outcome) -> dict[str, Any]:
    """How the arm's curves are drawn."""
    dashes = DASHES[_place(arm, outcome) // len(COLOURS) % len(DASHES)]
    return {"color": colour(arm, outcome), "linestyle": dashes, "linewidth": 2.0}


def _place(arm: Arm, outcome: Outcome) -> int:
    return [other.name for other in outcome.arms].index(arm.name)


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, dpi=130, format="png")
    return target.getvalue()
