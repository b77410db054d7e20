"""A study's tables: the same cells for the terminal and for the page."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.table import Table

from cggr_train.display import format_bytes
from cggr_train.report.text import count, difference, duration, loss
from cggr_train.study.analysis import FURTHER_CONTROLS
from cggr_train.study.intervals import Interval, interval

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cggr_train.study.analysis import Outcome

READING_NAMES = {"time": "equal time", "tokens": "equal tokens", "kept": "equal kept tokens"}

FURTHER = dict(zip(FURTHER_CONTROLS, ("checkpointed", "equal memory"), strict=True))

DIVERGED, CONTROL_DIVERGED = "diverged", "control diverged"


class Cells(NamedTuple):
    """A table, cell by cell.

    Attributes:
        title: Above it.
        note: Below it.
        headings: Column headings, the arm's first.
        rows: Name of the arm, then the cells.
        best: Arms and column numbers of the best cells of each column.
    """

    title: str
    note: str
    headings: list[str]
    rows: list[tuple[str, list[str]]]
    best: frozenset[tuple[str, int]]


def study_cells(outcome: Outcome) -> list[Cells]:
    """The tables of a study."""
    found = [_losses(outcome), _differences(outcome)]
    if outcome.accuracy or outcome.accuracy_after_tokens:
        found.insert(1, _accuracies(outcome))
    return [*found, _gradients(outcome)] if outcome.gradients else found


def comparison_tables(outcome: Outcome) -> list[Table]:
    """The tables for a terminal."""
    tables = []
    for cells in study_cells(outcome):
        table = Table(
            title=cells.title, caption=cells.note, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
            pad_edge=False, collapse_padding=True,
        )  # fmt: skip
        longest = max(len(word) for name, _ in cells.rows for word in outcome.arm(name).title.split())
        for number, heading in enumerate(cells.headings):
            least = None if number else longest  # so that names are broken between words
            table.add_column(heading, justify="right" if number else "left", overflow="fold", min_width=least)
        for name, row in cells.rows:
            table.add_row(
                outcome.arm(name).title,
                *(f"[bold]{cell}[/]" if (name, n) in cells.best else cell for n, cell in enumerate(row)),
            )
        tables.append(table)
    return tables


def _losses(outcome: Outcome) -> Cells:
    rows = []
    for arm in outcome.arms:
        name, memory = arm.name, outcome.memory[arm.name]
        rows.append(
            (
                name,
                [
                    duration(outcome.step_seconds[name][0]),
                    format_bytes(memory["peak_bytes"]),
                    format_bytes(max(0, memory["peak_bytes"] - memory["start_bytes"])),
                    *_read(outcome, name),
                ],
            )
        )
    best = {
        (min(table, key=lambda name: table[name].loss.mean), 3 + number)
        for number, table in enumerate(outcome.comparisons[reading] for reading in READING_NAMES)
    }
    amounts = outcome.amounts
    seeds = f"{outcome.seeds} seeds" if outcome.seeds > 1 else "one seed"
    return Cells(
        f"Held-out loss, nats per token ({seeds}, ± half of the 95% interval)",
        f"Compared at {duration(amounts['time'])} of training (steps times time per step, timed alone), "
        f"{count(amounts['tokens'])} tokens seen, {count(amounts['kept'])} tokens kept.",
        [
            "arm",
            "step",
            "peak memory",
            "training adds",
            *READING_NAMES.values(),
        ],
        rows,
        frozenset(best),
    )


def _read(outcome: Outcome, name: str) -> list[str]:
    """Losses of an arm at each reading."""
    if name in outcome.diverged:
        return [DIVERGED] * len(READING_NAMES)
    return [loss(outcome.comparisons[reading][name].loss) for reading in READING_NAMES]


def _accuracies(outcome: Outcome) -> Cells:
    """Shares of right answers, and of those at equal tokens if requested."""
    readings = {"equal time": outcome.accuracy, "equal tokens": outcome.accuracy_after_tokens}
    found = {
        heading: {name: interval(shares) for name, shares in every.items() if shares}
        for heading, every in readings.items() if every
    }  # fmt: skip
    rows = [
        (
            arm.name,
            [
                format_bytes(outcome.memory[arm.name]["peak_bytes"]),
                *(_share(outcome, by, arm.name) for by in found.values()),
            ],
        )
        for arm in outcome.arms
    ]
    best = {
        (name, 1 + number)
        for number, by in enumerate(found.values())
        for name, share in by.items()
        if min(other.mean for other in by.values()) < share.mean == max(other.mean for other in by.values())
    }
    return Cells(
        "Exact match on the held-out questions, greedy decoding",
        "± half of the 95% interval over seeds.",
        ["arm", "peak memory", *found],
        rows,
        frozenset(best),
    )


def _share(outcome: Outcome, found: Mapping[str, Interval], name: str) -> str:
    value = found.get(name)
    if value is None:
        return DIVERGED if name in outcome.diverged else ""
    return f"{value.mean:.1%}" + ("" if value.high is None else f" ±{value.high - value.mean:.1%}")


def _differences(outcome: Outcome) -> Cells:
    rows = []
    present = {arm.name for arm in outcome.arms}
    further = {name: heading for name, heading in FURTHER.items() if name in present}
    columns = ["standard", *further.values(), "batch of equal cost", "random, same ratio"]
    if any(arm.own_precision for arm in outcome.arms):
        columns.append("own precision")
    for arm in outcome.arms:
        if arm.method == "standard":
            continue
        equal = arm.equal_cost if arm.equal_cost != "standard" else None
        if arm.name in outcome.diverged:
            rows.append((arm.name, [DIVERGED] * len(columns)))
            continue
        found = outcome.comparisons["time"][arm.name].against
        cells = [
            CONTROL_DIVERGED if control in outcome.diverged else difference(found.get(control or ""))
            for control in ("standard", *further, equal, arm.random, arm.own_precision)
        ]
        rows.append((arm.name, cells[: len(columns)]))
    return Cells(
        "Equal time: loss of each arm minus the loss of its controls, paired by seed",
        "Negative is better than the control. 95% intervals are in brackets; an interval that contains zero shows no "
        "difference.",
        ["arm", *columns],
        rows,
        frozenset(),
    )


def _gradients(outcome: Outcome) -> Cells:
    places = list(outcome.gradients)
    rows = []
    for arm in outcome.arms:
        cells = []
        for place in places:
            found = outcome.gradients[place].get(arm.name)
            if found is not None:
                cells += [
                    f"{statistics.fmean(found['cosine']):.3f}",
                    f"{statistics.fmean(found['variance']):.3f}",
                    f"{statistics.fmean(found['bias']):.3f}",
                ]
        if cells:
            rows.append((arm.name, cells))
    headings = [f"{what}, {place}" for place in places for what in ("cosine", "variance", "squared bias")]
    return Cells(
        "One step's gradient compared with the full gradient of the same held-out batch",
        "Cosine of one draw, variance over draws and squared bias (both relative to the full gradient's squared norm), "
        "at the start and at the end of the standard run. An estimated squared bias can be negative within its error.",
        ["arm", *headings],
        rows,
        frozenset(),
    )
