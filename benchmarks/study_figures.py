"""Figures of the results of ``benchmarks.study``, from its JSON files: ``python -m benchmarks.study_figures``."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import _record

READINGS = {"tokens": "equal tokens", "time": "equal time", "kept": "equal kept tokens"}
UNITS = {"s": "seconds", "nat": "held-out loss, nats per token"}
COLOURS = {"standard": "0.3", "equal_cost": "0.55", "batch": "0.75", "random": "#e69f00", "asked": "#2a6f97"}


def draw(result: dict[str, Any]) -> None:
    """Losses of all arms with their 95% intervals, one panel per valid reading; written beside the JSON file."""
    rows, unreliable = result["rows"], result["settings"].get("unreliable", [])
    readings = {reading: title for reading, title in READINGS.items() if reading not in unreliable}
    figure = Figure(figsize=(13, 1.4 + 0.3 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(readings), sharey=True)
    for axes, (reading, title) in zip(panels, readings.items(), strict=True):
        _panel(axes, rows, reading)
        axes.set_title(title, fontsize=10, loc="left")
    labels = [row["label"] + (" (diverged)" if "diverged" in row else "") for row in rows.values()]
    panels[0].set_yticks(range(len(rows)), labels, fontsize=8)
    panels[0].invert_yaxis()
    settings = result["settings"]
    amounts = settings["amounts"]
    figure.suptitle(
        f"{result['benchmark']}: held-out loss, nats per token, {settings['seeds']} seeds, 95% intervals. "
        f"{amounts['tokens'] / 1e3:,.0f}k tokens, {amounts['kept'] / 1e3:,.0f}k kept tokens. "
        f"{result['environment']['device']}",
        fontsize=9, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(_record.RESULTS / f"{result['benchmark']}.png", dpi=130)


def _panel(axes: Axes, rows: dict[str, Any], reading: str) -> None:
    for place, row in enumerate(rows.values()):
        if reading not in row["loss"]:
            continue
        found = row["loss"][reading]
        low, high = (found[end] if found[end] is not None else found["mean"] for end in ("low", "high"))
        error = [[found["mean"] - low], [high - found["mean"]]]
        axes.errorbar(found["mean"], place, xerr=error, fmt="o", color=COLOURS[row["role"]], capsize=3, markersize=5)
    axes.axvline(next(iter(rows.values()))["loss"][reading]["mean"], color="0.8", linewidth=1, zorder=0)
    axes.grid(axis="x", color="0.93")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    for path in sorted(_record.RESULTS.glob("study_*.json")):
        found = _record.load(path.stem)
        if "amounts" in found["settings"]:
            draw(found)
        else:
            unit = next(iter(found["rows"].values()))["unit"]
            _record.plot(found, path.with_suffix(".png"), label=UNITS[unit])
