"""A study's plots, as PNG bytes for its page."""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cggr_train.report.curves import FAINT, INK, new_figure
from cggr_train.study.frontier import measured_by_accuracy, non_dominated, points
from cggr_train.study.intervals import interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cggr_train.study.analysis import Outcome
    from cggr_train.study.arms import Arm

SELECTION_COLOURS = {
    "supervised": "#009e73",
    "random": "#e69f00",
    "stratified": "#009e73",
    "sampled": "#56b4e9",
    "sequence_aware": "#cc79a7",
    "topk": "#d55e00",
}
"""From the Okabe-Ito palette, like those of the standard arms: told apart by colour-blind readers too."""
ROLE_COLOURS = {
    "standard": INK,
    "equal_cost": "#0072b2",
    "batch": "#8a8a8a",
    "checkpointed": "#7b4ab5",
    "equal_memory": "#a0522d",
}
LINES = ("-", "--", ":", "-.")


def draw_frontier(outcome: Outcome) -> bytes:
    """Quality in the same time against peak memory: one point for each arm, the non-dominated ones joined."""
    every = points(outcome)
    with new_figure(10, 5.5) as figure:
        axes = figure.subplots()
        scale = 100 if measured_by_accuracy(outcome) else 1
        for point in every:
            arm, found = outcome.arm(point.name), point.quality
            ends = [[0.0], [0.0]]
            if found.low is not None and found.high is not None:
                ends = [[scale * (found.mean - found.low)], [scale * (found.high - found.mean)]]
            where = point.peak_bytes / 2**30
            axes.errorbar(
                where, scale * found.mean, yerr=ends, color=_colour(arm), marker="o", capsize=3, linewidth=1.2
            )
            axes.annotate(arm.title, (where, scale * found.mean), xytext=(6, 5), textcoords="offset points", fontsize=8)
        best = non_dominated(every)
        x, y = ([p.peak_bytes / 2**30 for p in best], [scale * p.quality.mean for p in best])
        axes.plot(x, y, color=FAINT, linewidth=1.2, zorder=0)
        what = "Right answers, %" if measured_by_accuracy(outcome) else "Held-out loss, nats per token"
        axes.set_title(f"{what}, after the same time")
        axes.set_xlabel("peak memory of a step, GiB")
        axes.margins(x=0.18, y=0.1)
        return _png(figure)


def draw_losses(outcome: Outcome) -> bytes:
    """Held-out loss over training time and over tokens: one row for each gradient mode and ratio, with its controls.

    An arm that diverged is drawn up to there, as far as it fits.
    """
    groups = _groups(outcome)
    with new_figure(12, 0.6 + 3.4 * len(groups)) as figure:
        grid = figure.subplots(len(groups), 2, squeeze=False, sharex="col", sharey=True)
        for row, (title, arms) in zip(grid, groups, strict=True):
            _curves(row[0], outcome, arms, lambda point: point["seconds"])
            _curves(row[1], outcome, arms, lambda point: point["tokens"] / 1000)
            row[0].set_title(f"{title}: over training time")
            row[1].set_title("the same runs over tokens seen")
            row[0].set_ylabel("held-out loss, nats")
            row[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))  # beside the curves
            for axes in row:
                axes.tick_params(labelbottom=True)
            row[0].axvline(outcome.amounts["time"], color=FAINT, linewidth=1, linestyle=":")
            row[1].axvline(outcome.amounts["tokens"] / 1000, color=FAINT, linewidth=1, linestyle=":")
        grid[-1][0].set_xlabel("seconds: steps times the step's time, measured alone")
        grid[-1][1].set_xlabel("thousand tokens")
        # the untrained model, first of each curve, would squeeze the rest
        later = [
            point["heldout_loss"]
            for name, runs in outcome.curves.items()
            for points in runs
            for point in points[1:]
            if name not in outcome.diverged
        ]
        room = 0.06 * (max(later) - min(later)) + 0.01
        grid[0][0].set_ylim(min(later) - room, max(later) + room)
        return _png(figure)


def draw_costs(outcome: Outcome) -> bytes:
    """Time of a step with its quartiles, and the memory that training adds, as bars."""
    arms = outcome.arms
    with new_figure(10, 1.0 + 0.3 * len(arms)) as figure:
        time, memory = figure.subplots(1, 2, sharey=True)
        places = list(range(len(arms)))
        found = [outcome.step_seconds[arm.name] for arm in arms]
        middle = [1000 * values[0] for values in found]
        spread = [
            [max(0.0, 1000 * (values[0] - values[1])) for values in found],
            [max(0.0, 1000 * (values[2] - values[0])) for values in found],
        ]
        colours = [_colour(arm) for arm in arms]
        time.barh(places, middle, xerr=spread, color=colours, height=0.65, error_kw={"linewidth": 1, "ecolor": INK})
        adds = [outcome.memory[a.name]["peak_bytes"] - outcome.memory[a.name]["start_bytes"] for a in arms]
        memory.barh(places, [max(0, value) / 2**20 for value in adds], color=colours, height=0.65)
        time.set_yticks(places, [arm.title for arm in arms], fontsize=8)
        time.invert_yaxis()
        time.set_title("Time of a step, scoring included")
        time.set_xlabel("ms (median and quartiles)")
        memory.set_title("Memory that training adds")
        memory.set_xlabel("MiB at the peak, less what the model held before")
        return _png(figure)


def draw_kept(outcome: Outcome) -> bytes:
    """Kept share by place in the sequence, by frequency of the token and by score: one row for each ratio."""
    rows: dict[float, dict[str, Arm]] = {}
    for arm in outcome.arms:
        if arm.name in outcome.kept:
            # the gradient mode has no part in the choice
            key = arm.label.split(",")[0]
            rows.setdefault(arm.routing.ratio, {}).setdefault(key, arm)
    titles = {
        "position": ("kept by place", "first tenth of the sequence … last"),
        "frequency": ("by frequency of the token", "rarest tenth … most frequent"),
        "score": ("by score", "lowest tenth … highest"),
    }
    with new_figure(10, 0.6 + 2.8 * len(rows)) as figure:
        grid = figure.subplots(len(rows), 3, squeeze=False, sharey="row")
        for row, (ratio, arms) in zip(grid, sorted(rows.items()), strict=True):
            for axes, (name, (title, ends)) in zip(row, titles.items(), strict=True):
                for label, arm in arms.items():
                    shares = [100 * share for share in outcome.kept[arm.name][name]]
                    axes.plot(range(1, len(shares) + 1), shares, label=label, **_line(arm, outcome))
                axes.set_xlabel(ends)
                axes.set_xticks([])
                axes.set_title(title if name != "position" else f"Ratio {ratio:g}: {title}", fontsize=10)
            highest = max(max(shares) for arm in arms.values() for shares in outcome.kept[arm.name].values())
            row[0].set_ylim(0, 100 * max(1.05 * highest, 0.01))
            row[0].set_ylabel("kept, %")
            row[0].legend(fontsize=8)
        return _png(figure)


def _groups(outcome: Outcome) -> list[tuple[str, list[Arm]]]:
    """Routed arms of one gradient mode and ratio, with the standard arms that they are held against."""
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
    return found


def _curves(axes: Axes, outcome: Outcome, arms: Sequence[Arm], where: Callable[[dict[str, float]], float]) -> None:
    for arm in arms:
        # of an arm that diverged, as far as every seed got
        across = list(zip(*outcome.curves[arm.name], strict=arm.name not in outcome.diverged))
        label = f"{arm.title} (diverged)" if arm.name in outcome.diverged else arm.title
        x = [statistics.fmean(where(point) for point in points) for points in across]
        found = [interval([point["heldout_loss"] for point in points]) for points in across]
        axes.plot(x, [value.mean for value in found], label=label, marker="o", markersize=2.5,
                  **_line(arm, outcome))  # fmt: skip
        if found[0].low is not None:
            low, high = ([value.low for value in found], [value.high for value in found])
            axes.fill_between(x, low, high, color=_colour(arm), alpha=0.12, linewidth=0)  # pyright: ignore[reportArgumentType]


def _colour(arm: Arm) -> str:
    return ROLE_COLOURS[arm.role] if arm.method == "standard" else SELECTION_COLOURS[arm.routing.selection]


def _line(arm: Arm, outcome: Outcome) -> dict[str, Any]:
    """Colour by selection or role; arms of one colour differ by their line: by score, or by batch."""
    if arm.method == "standard":
        kinds = [other.batch_size for other in outcome.arms if other.role == arm.role]
        place = kinds.index(arm.batch_size)
    else:
        scores = list(dict.fromkeys(_score(other) for other in outcome.arms if other.role == "asked"))
        place = scores.index(_score(arm)) if arm.role == "asked" else 0
    return {"color": _colour(arm), "linestyle": LINES[place % len(LINES)], "linewidth": 1.7}


def _score(arm: Arm) -> tuple[str, str]:
    return arm.routing.scoring, arm.routing.scorer


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, dpi=130, format="png")
    return target.getvalue()
