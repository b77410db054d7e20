"""What the demo's figures say, as a table and in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from cggr_train.display import format_bytes

NOISE = 0.1
"""Nats that count as no difference: two seeds of the demo's standard run came out 0.09 apart."""

COLUMNS = ("held-out loss", "steps", "tokens seen", "tokens kept", "time per step", "peak memory", "training adds")
CONTROLS = ("standard", "half_batch", "random")


def results_table(results: Sequence[Mapping[str, Any]], labels: Mapping[str, str], *, seconds: float) -> Table:
    """The comparison for a terminal; the best of a column is bold."""
    table = Table(
        title=f"the same {seconds:g} seconds of training each", title_justify="left", box=box.SIMPLE_HEAD,
        pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    table.add_column("method", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
    best = min(result["heldout_loss"] for result in results)
    for result in results:
        loss = f"{result['heldout_loss']:.3f}"
        table.add_row(
            labels[result["name"]],
            f"[bold]{loss}[/]" if result["heldout_loss"] == best else loss,
            *row_cells(result),
        )
    return table


def row_cells(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Every column but the name and the loss, as text."""
    return (
        f"{result['steps']:,}",
        _thousands(result["tokens"]),
        _thousands(result["kept_tokens"]),
        f"{1000 * result['step_seconds']:,.0f} ms",
        format_bytes(result["peak_bytes"]),
        format_bytes(max(0, result["peak_bytes"] - result["start_bytes"])),
    )


def verdict(results: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[str]:
    """Plain sentences: who won, how CGGR stands to each control, and what to use on this evidence.

    Args:
        results: Figures of the four runs.
        labels: Names for people.

    Example:
        >>> losses = {"standard": 4.0, "half_batch": 3.8, "random": 4.1, "cggr": 4.0}
        >>> runs = [{"name": name, "heldout_loss": loss, "step_seconds": 1.0, "core_share": 1.0,
        ...          "peak_bytes": 2, "start_bytes": 1}
        ...         for name, loss in losses.items()]
        >>> verdict(runs, {name: name for name in losses})[3]
        'Half the batch learns more in the same time: on this evidence, use it instead of CGGR.'
    """
    by_name = {result["name"]: result for result in results}
    routed, plain = by_name["cggr"], by_name["standard"]
    first = min(results, key=lambda result: result["heldout_loss"])
    behind = {name: routed["heldout_loss"] - by_name[name]["heldout_loss"] for name in CONTROLS}
    own, other = (max(1, run["peak_bytes"] - run["start_bytes"]) for run in (routed, plain))
    comparisons = [f"{_difference(difference)} {labels[name]}" for name, difference in behind.items()]
    return [
        f"Lowest held-out loss in the same time: {labels[first['name']]} ({first['heldout_loss']:.3f}).",
        f"{labels['cggr']} ({routed['heldout_loss']:.3f}) is {', '.join(comparisons)}.",
        f"Its step takes {routed['step_seconds'] / plain['step_seconds']:.2f} of the standard step's time and adds "
        f"{own / other:.2f} of the memory.",
        *_conclusions(behind),
        f"One run each: another seed moves a loss by up to about {NOISE:g}, so less than that counts as level; and a "
        "small model trained for seconds says little about yours. Compare on your own data before you decide.",
        *_disturbances(results),
    ]


def _disturbances(results: Sequence[Mapping[str, Any]]) -> list[str]:
    shares = [result["core_share"] for result in results]
    if min(shares) >= 0.85:
        return []
    return [
        f"The machine was busy with other work: the runs had {min(shares):.0%} to {max(shares):.0%} of a core each. "
        "Steps and times are not to be relied on; repeat this on a quiet machine."
    ]


def _conclusions(behind: Mapping[str, float]) -> list[str]:
    lines = []
    if behind["half_batch"] > NOISE:
        lines.append("Half the batch learns more in the same time: on this evidence, use it instead of CGGR.")
    elif behind["half_batch"] >= -NOISE:
        lines.append("Half the batch does as well in the same time and is simpler: on this evidence, use it.")
    if behind["standard"] > NOISE:
        lines.append("Standard training learns more in the same time: CGGR is worth it here only to save memory.")
    if behind["random"] > NOISE:
        lines.append("Random tokens do better than scored ones: the score costs more than it brings here.")
    elif behind["random"] >= -NOISE:
        lines.append("Random tokens do as well as scored ones: the score does not pay for itself here.")
    return lines or ["CGGR makes the best use of the time here."]


def _thousands(count: int) -> str:
    return f"{count / 1e6:.2f}M" if count >= 1_000_000 else f"{count / 1e3:.0f}k" if count >= 10_000 else f"{count:,}"


def _difference(difference: float) -> str:
    if abs(difference) <= NOISE:
        return f"level ({difference:+.3f}) with"
    return f"{abs(difference):.3f} better than" if difference < 0 else f"{difference:.3f} worse than"
