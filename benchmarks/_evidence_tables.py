"""Tables of docs/evidence.md that stand between comments with their names, each of one result."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _record
from cggr_train.study.intervals import interval

_MODEL = "smollm2_135m_instruct"
_HALF = "half, "
LABELS = {
    "standard-b4": "standard, batch 4", "standard-b1": "standard, batch 1", "standard-b6": "standard, batch 6",
    "standard-b16": "standard, batch 16", "standard-micro4": "standard, 4 at a time",
    "standard-checkpointed": "standard, checkpointed", "kv": "`kv`, supervised tokens",
    **{f"kv-margin{n}": f"the same, plus {n} tokens before each answer" for n in (32, 128)},
    "kv-random": "`kv` 0.25, random", "kv-sampled": "`kv` 0.25, sampled by gradient norm",
    "kv-stratified": "`kv` 0.25, stratified by gradient norm", "kv-stretches": "`kv` 0.25, random stretches of 32",
    "exact-sampled": "`exact` 0.25, sampled", "kv-half": f"{_HALF}scattered",
    "kv-window": f"{_HALF}a window that moves over the epochs", "kv-sentences": f"{_HALF}whole sentences",
    **{f"kv-stretch{n}": f"{_HALF}stretches of {n}" for n in (16, 32, 64, 128)},
    "kv-lower": "`kv` in the lower half of the layers, `exact` above",
    "kv-upper": "`kv` in the upper half, `exact` below",
}  # fmt: skip
TABLES = {
    "context, recorded": ("arms", f"context_{_MODEL}", "recorded"),
    "context, as run by default": ("arms", f"context_{_MODEL}", "usual"),
    "context, all problems": ("answers", "context_all_problems", "recorded"),
    "Qwen": ("arms", "context_qwen2.5_coder_0.5b_instruct", "recorded"),
    "answers": ("arms", f"answers_{_MODEL}", "recorded"),
    "batches": ("arms", f"batches_{_MODEL}", "recorded"),
    "context-parts": ("parts", f"context-parts_{_MODEL}", "recorded"),
    "answers-parts": ("parts", f"answers-parts_{_MODEL}", "recorded"),
}
"""By name: kind, result without ``frontier_``, and how steps are taken."""


def with_interval(values: Sequence[float], *, signed: bool = False) -> str:
    """The mean, and its 95% interval where there are several values.

    Example:
        >>> with_interval([0.25]), with_interval([0.5, 0.5])
        ('0.250', '0.500 [0.500, 0.500]')
    """
    found, sign = interval(list(values)), "+" if signed else ""
    ends = "" if found.low is None or found.high is None else f" [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"
    return f"{found.mean:{sign}.3f}{ends}".replace("-", "\N{MINUS SIGN}")


def right_answers(readings: Sequence[Mapping[str, int]]) -> str:
    """The share of right answers, its standard error in percentage points, and the number of answers.

    Example:
        >>> right_answers([{"right": 10, "questions": 100}, {"right": 30, "questions": 100}])
        '20.0% ± 2.8 of 200'
    """
    asked = sum(reading["questions"] for reading in readings)
    if not asked:
        return ""
    share = sum(reading["right"] for reading in readings) / asked
    return f"{share:.1%} ± {100 * math.sqrt(share * (1 - share) / asked):.1f} of {asked:,}"


def less(losses: Sequence[float], others: Sequence[float]) -> list[float]:
    """Differences, by seed."""
    return [own - other for own, other in zip(losses, others, strict=True)]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 0.02 else f"{seconds * 1e3:.1f}"


def _lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    used = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    head, *lines = ("| " + " | ".join(row[place] for place in used) + " |" for row in (heads, *rows))
    return "\n".join([head, "|---" * len(used) + "|", *lines])


def _label(name: str, row: Mapping[str, Any]) -> str:
    return LABELS.get(name) or f"{name}, batch {row['batch']}"


def arms(rows: Mapping[str, Mapping[str, Any]], basis: str) -> str:
    """What every arm reaches in the same time; the lowest loss in bold."""
    rows = {name: row for name, row in rows.items() if basis in row}
    shares = list(next(iter(rows.values()))[basis]["readings"])
    lowest = {share: min(interval(row[basis]["readings"][share]["losses"]).mean for row in rows.values())
              for share in shares}  # fmt: skip
    named = ["loss"] if len(shares) == 1 else ["loss after a third of the time", "after all of it"]
    found = []
    for name, row in rows.items():
        own = row[basis]
        losses = []
        for share in shares:
            values = own["readings"][share]["losses"]
            text = with_interval(values)
            if interval(values).mean == lowest[share]:
                text = re.sub(r"^\S+", r"**\g<0>**", text)
            losses.append(text)
        last = own["readings"][shares[-1]]
        found.append([
            _label(name, row), _milliseconds(own["step_seconds"]), f"{own['peak_bytes'] / 1e9:.1f} GB",
            str(last["steps"]), *losses, right_answers(last["accuracy"]),
        ])  # fmt: skip
    return _lines(["step", "ms", "peak memory", "steps", *named, "right answers"], found)


def answers(rows: Mapping[str, Mapping[str, Any]], basis: str) -> str:
    """Right answers after the same examples, one row for each training run."""
    first = next(iter(rows.values()))["equal_examples"]["losses"]
    found = []
    for name, row in rows.items():
        equal = row["equal_examples"]
        if row["same_run_as"] is None:
            gap = with_interval(less(equal["losses"], first), signed=True) if found else ""
            by_seed = ", ".join(str(reading["right"]) for reading in equal["accuracy"])
            found.append(
                [_label(name, row), with_interval(equal["losses"]), gap, right_answers(equal["accuracy"]), by_seed]
            )
    return _lines(["from the same examples", "loss", "less standard", "right answers", "by seed"], found)


def parts(rows: Mapping[str, Mapping[str, Any]], basis: str) -> str:
    """Losses less those of ``kv``, in the same time and from the same examples."""
    share = list(rows["kv"][basis]["readings"])[-1]
    found = []
    for name, row in rows.items():
        own, its = row[basis]["readings"][share], rows["kv"][basis]["readings"][share]
        gaps = (
            []
            if name == "kv"
            else [
                less(own["losses"], its["losses"]),
                less(row["equal_examples"]["losses"], rows["kv"]["equal_examples"]["losses"]),
            ]
        )
        found.append([
            _label(name, row), _milliseconds(row[basis]["step_seconds"]), str(own["steps"]),
            with_interval(own["losses"]), *([with_interval(gap, signed=True) for gap in gaps] or ["", ""]),
        ])  # fmt: skip
    heads = ["step", "ms", "steps", "loss", "less `kv`, in the same time", "less `kv`, from the same examples"]
    return _lines(heads, found)


def table(name: str, folder: Path = _record.RESULTS) -> str:
    """One of :data:`TABLES`."""
    kind, result, basis = TABLES[name]
    rows = _record.load(f"frontier_{result}", folder=folder)["rows"]
    rows = dict(sorted(rows.items(), key=lambda item: not item[0].startswith("standard")))
    return {"arms": arms, "answers": answers, "parts": parts}[kind](rows, basis)


def between(name: str) -> tuple[str, str]:
    """The comments that a table stands between."""
    return f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"


def renew(document: Path, folder: Path = _record.RESULTS) -> None:
    """Write every table of a document anew."""
    text = document.read_text(encoding="utf-8")
    for name in TABLES:
        begin, end = between(name)
        if begin in text:
            before, after = text.split(begin)
            text = before + begin + table(name, folder) + end + after.split(end, 1)[1]
    document.write_text(text, encoding="utf-8")
