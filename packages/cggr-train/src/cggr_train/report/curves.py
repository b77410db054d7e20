"""Learning curves as PNG files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT = "#1f2933", "#9aa5b1"
COLOURS = {"standard": "#52606d", "half_batch": "#0072b2", "random": "#e69f00", "cggr": "#009e73"}
"""One colour per method, from the colour-blind-safe Okabe-Ito palette."""
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def draw_learning_curve(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the log of one run: training and held-out loss above, keep ratio below.

    Args:
        records: The run's log, see :func:`cggr_train.log.read_log`.
        path: PNG file to write, atomically.
    """
    train = [record for record in records if record.get("event") == "train" and record.get("loss") is not None]
    heldout = [record for record in records if record.get("event") == "heldout"]
    steps = [record["step"] for record in train]
    losses = [record["loss"] for record in train]
    with new_figure(7.5, 5.5) as figure:
        loss_axes, keep_axes = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (3, 1)})
        loss_axes.plot(steps, losses, color=COLOURS["cggr"], alpha=0.35, linewidth=1, label="training, as logged")
        loss_axes.plot(steps, _smooth(losses), color=COLOURS["cggr"], linewidth=2, label="training, smoothed")
        loss_axes.plot(
            [record["step"] for record in heldout], [record["heldout_loss"] for record in heldout],
            color=INK, marker="o", markersize=4, linewidth=1.2, label="held out, all tokens",
        )  # fmt: skip
        loss_axes.set_title("Loss, nats per token")
        loss_axes.legend()
        keep_axes.plot(steps, [100 * record.get("keep_ratio", 1.0) for record in train], color=COLOURS["half_batch"])
        keep_axes.set_ylim(0, 105)
        keep_axes.set_title("Kept tokens, % of countable")
        keep_axes.set_xlabel("step")
        _write(figure, path)


@contextmanager
def new_figure(width: float, height: float) -> Iterator[Figure]:
    """A figure of this size in inches, in the reports' style; without pyplot, so without global state or display."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        yield Figure(figsize=(width, height), layout="constrained")


def _write(figure: Figure, path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=150, format="png")
    temporary.replace(path)


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a twentieth of the curve, without the bias of its start."""
    weight = max(0.0, 1 - 20 / max(len(values), 1))
    smoothed, total, mass = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        smoothed.append(total / mass)
    return smoothed
