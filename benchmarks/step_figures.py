"""The plot and the table of a 1B model's step in the README, from ``step_time_1b_fp8.json``.

``python -m benchmarks.step_figures`` draws ``step_time_1b.png`` and writes the table between the marks of
``README.md``: the steps of :data:`STEPS`, each with its time and peak memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import _record
from benchmarks.trl_figures import put

ROOT = Path(__file__).parents[1]
RESULT = "step_time_1b_fp8"
STEPS = {
    "standard": "standard",
    "standard, checkpointed": "standard, gradient checkpointing",
    "standard, fused layers": "standard, fused layers",
    "standard, compiled": "standard, `torch.compile`",
    "two passes, full-depth scores, kv": "CGGR, scores from the full model",
    "interleaved, truncated router, kv": "CGGR, scores from the first 2 of 16 layers",
    "interleaved, random, kv": "CGGR, random tokens",
}
"""Maps a row of the result to its name in the README."""
_GREY, _BLUE = "0.62", "#2a6f97"


def table(rows: dict[str, Any]) -> str:
    """The README's table."""
    lines = ["| step | ms | speedup | peak memory above the model |", "|---|---|---|---|"]
    for name, label in STEPS.items():
        row = rows[name]
        lines.append(
            f"| {label} | {1e3 * row['median']:.1f} | {row['ratio']['median']:.2f}x | "
            f"{row['peak_extra_bytes'] / 1e9:.1f} GB |"
        )
    return "\n".join(lines)


def draw(result: dict[str, Any], path: Path) -> None:
    """Time and memory of a step side by side, with a label on every bar."""
    figure = Figure(figsize=(8.2, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = [result["rows"][name] for name in STEPS]
    _bars(left, [1e3 * row["median"] for row in rows], "{:.0f} ms", "time of a step")
    _bars(right, [row["peak_extra_bytes"] / 1e9 for row in rows], "{:.1f} GB", "peak memory above the model")
    left.set_yticks(range(len(STEPS)), [label.replace("`", "") for label in STEPS.values()])
    left.invert_yaxis()
    settings = result["settings"]
    figure.suptitle(
        f"Llama-3.2-1B sizes, {settings['batch']} rows of {settings['length']:,} tokens, a quarter kept, "
        f"{result['environment']['device']}",
        fontsize=9, x=0.01, ha="left",
    )  # fmt: skip
    figure.savefig(path, dpi=150)


def _bars(axes: Axes, sizes: list[float], text: str, title: str) -> None:
    colours = [_GREY if name.startswith("standard") else _BLUE for name in STEPS]
    for place, (size, colour) in enumerate(zip(sizes, colours, strict=True)):
        axes.barh(place, size, color=colour, height=0.68)
        axes.annotate(text.format(size), (size, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlim(0, 1.3 * max(sizes))
    axes.set_xticks([])
    axes.tick_params(left=False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def main() -> None:
    """Draw the plot and write the table."""
    result = _record.load(RESULT)
    draw(result, _record.RESULTS / "step_time_1b.png")
    put(ROOT / "README.md", "steps", table(result["rows"]))
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
