"""The plots of `benchmarks.frontier`, from its JSON files alone: ``python -m benchmarks.frontier_figures``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import _record
from cggr_train.study.intervals import interval

COLOURS = {"standard": "0.25", "checkpointed": "0.25", "equal_memory": "0.25", "equal_cost": "0.55", "batch": "0.55",
           "random": "#e69f00", "asked": "#2a6f97"}  # fmt: skip
TITLES = {"recorded": "every step recorded as one CUDA graph", "usual": "steps as they run by default"}


def draw(path: Path, bases: Sequence[str] = tuple(TITLES), *, suffix: str = "") -> Path:
    """Held-out loss after the same time against the peak memory of a step, beside the JSON file.

    A point for each arm with its 95% interval over seeds; the arms than which none is better in one respect and no
    worse in the other are joined.

    Args:
        path: Of the JSON file.
        bases: A panel for each.
        suffix: Of the plot's name.
    """
    result = _record.load(path.stem, folder=path.parent)
    bases = [basis for basis in bases if any(basis in row for row in result["rows"].values())]
    figure = Figure(figsize=(5.6 * len(bases) + 1.6 * (len(bases) == 1), 4.4), layout="constrained")
    panels = figure.subplots(1, len(bases), squeeze=False, sharey=True)[0]
    for axes, basis in zip(panels, bases, strict=True):
        _panel(axes, result["rows"], basis)
        axes.set_title(TITLES[basis], fontsize=10, loc="left")
        axes.set_xlabel("peak memory of a step, GB")
    panels[0].set_ylabel("held-out loss, nats per answer token")
    settings = result["settings"]
    seeds = "one seed" if settings["seeds"] == 1 else f"{settings['seeds']} seeds"
    figure.suptitle(
        f"{settings['model']}, {settings['length']:,} tokens, {settings['supervised']:.0%} supervised: loss after "
        f"{settings['seconds']:.1f} s, {seeds},{' ' if len(bases) > 1 else chr(10)}95% intervals. "
        f"{result['environment']['device']}",
        fontsize=9, x=0.01, ha="left",
    )  # fmt: skip
    target = path.with_name(f"{path.stem}{suffix}.png")
    figure.savefig(target, dpi=150)
    return target


def _panel(axes: Axes, rows: dict[str, Any], basis: str) -> None:
    points = []
    for row in rows.values():
        if basis not in row:
            continue
        found = row[basis]
        last = list(found["readings"].values())[-1]
        value = interval(last["losses"])
        place = found["peak_bytes"] / 1e9
        ends = [[0.0], [0.0]]
        if value.low is not None and value.high is not None:
            ends = [[value.mean - value.low], [value.high - value.mean]]
        colour = COLOURS[row["role"]]
        axes.errorbar(place, value.mean, yerr=ends, fmt="o", color=colour, capsize=3, markersize=5)
        points.append((place, value.mean, row["label"], colour))
    best = [p for p in points if not any(o[0] <= p[0] and o[1] <= p[1] and o != p for o in points)]
    best.sort()
    axes.plot([p[0] for p in best], [p[1] for p in best], color="0.8", linewidth=1.2, zorder=0)
    _name(axes, points)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.94")
    axes.set_axisbelow(True)


def _name(axes: Axes, points: list[tuple[float, float, str, str]]) -> None:
    """Names at the right of the panel, in the order of their heights."""
    for number, (x, y, label, colour) in enumerate(sorted(points, key=lambda point: -point[1])):
        height = 1 - (number + 0.5) / len(points)
        axes.annotate(
            label, (x, y), xytext=(1.02, height), textcoords="axes fraction", va="center", fontsize=7.5, color=colour,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.45, "relpos": (0, 0.5)},
        )  # fmt: skip


if __name__ == "__main__":
    for found in sorted(_record.RESULTS.glob("frontier_*.json")):
        if "trials" in _record.load(found.stem)["settings"]:
            print(draw(found))
        if found.stem.startswith("frontier_context_smollm2") and "trials" in _record.load(found.stem)["settings"]:
            print(draw(found, ("recorded",), suffix="_recorded"))  # of the README
