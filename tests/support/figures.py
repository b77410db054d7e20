"""The figures in the tables of the documents, and the values in the JSON under ``benchmarks/results/``."""

import json
import re
import statistics
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.support.documents import ROOT

RESULTS = ROOT / "benchmarks" / "results"
_STUDENT = {
    2: 12.706,
    3: 4.303,
    4: 3.182,
    5: 2.776,
    6: 2.571,
}  # 97.5% quantiles, by the number of samples
_NUMBER = re.compile(r"[−-]?\d+(?:,\d{3})*(?:\.\d+)?")
_UNITS = {
    "ms": {"seconds": (1e3,)},
    "s": {"seconds": (1.0,), "": (1.0,)},
    "GB": {"bytes": (1e-9,), "": (1e-9,)},
    "MB": {"bytes": (1e-6,)},
    "MiB": {"bytes": (2**-20,)},
    "x": {"ratio": (1.0,)},
    "%": {"ratio": (1e2,), "": (1e2,)},
    "": {"seconds": (1.0, 1e3), "bytes": (1e-9, 2**-20), "ratio": (1.0,), "": (1.0, 1e2, 1e-3, 1e-12)},
}
"""Of each unit, the kinds of value that it is for, and what those are multiplied by."""
_KINDS = {"s": "seconds", "B": "bytes", "bytes": "bytes"}
_OF_THE_UNIT = ("median", "total", "windows", "spread", "mean", "low", "high")
_WORDS = {"seconds": "seconds", "bytes": "bytes", "ratio": "ratio", "memory": "bytes"}
_UNIT = re.compile(r"\s?(ms|GB|MB|MiB|x|s)\b|\s?(%)")


class Figure(NamedTuple):
    """A number in a cell of a table.

    Attributes:
        text: The number as printed.
        unit: What follows it, or else what stands in its column's heading; "" where neither names one.
        line: The table's row, for the message.
    """

    text: str
    unit: str
    line: str


class Value(NamedTuple):
    """A number that a result gives, in its own unit.

    Attributes:
        kind: ``seconds``, ``bytes``, ``ratio``, or ``""`` for anything else.
        number: The number.
    """

    kind: str
    number: float


def sections(document: Path) -> Iterator[tuple[str, str]]:
    """Heading and text of each section, code blocks left out."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        yield section.split("\n", 1)[0].lstrip("# "), section


def results_named(section: str) -> list[str]:
    """Names of the results that a section links to or names in backticks; ``moe_h*`` stands for several."""
    named = re.findall(r"results/([\w*.-]+?)(?=\.(?:json|png)|[^\w*.-])|`([\w*]+)(?:\.json)?`", section)
    return sorted({path.stem for one in named for path in RESULTS.glob(f"{one[0] or one[1]}.json")})


def figures(section: str) -> Iterator[Figure]:
    """Every number of a section's tables, their first columns and headings left out."""
    headings: list[str] = []
    for line in section.splitlines():
        if not line.startswith("|"):
            headings = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not headings:
            headings = cells
            continue
        for heading, cell in list(zip(headings, cells, strict=False))[1:]:
            bare = re.sub(r"`[^`]*`|\[[^\]]*\]\([^)]*\)|\*\*", "", cell)
            named = re.search(r"\b(ms|GB|MB|MiB)\b", f"{heading} {cells[0]}")
            for match in _NUMBER.finditer(bare):
                after = _UNIT.match(bare, match.end())
                unit = (after[1] or after[2]) if after else named[1] if named else ""
                if unit or len(match.group()) > 2:  # a bare 4 or 16 is a size, or found anywhere
                    yield Figure(match.group(), unit, line.strip())


def values(result: dict[str, Any]) -> list[Value]:
    """What a result gives: its numbers, means and 95% intervals over few seeds, and ratios of rows.

    The ratios are those to and of the control and of other ordinary steps, in time and in memory.
    """
    rows = {name: row for name, row in result["rows"].items() if isinstance(row, dict)}
    found = list(_leaves(rows, ""))
    for name, row in rows.items():
        for other, control in rows.items():
            case = ": " in name and name.split(": ")[0] == other.split(": ")[0]  # "16384x128256: eager"
            if not case and other not in (result.get("control"), "TRL") and not other.startswith("standard"):
                continue
            for measure in (_time, _memory):
                one, base = measure(row), measure(control)
                if one and base:
                    found += [Value("ratio", one / base), Value("ratio", base / one)]
    return found


def _time(row: dict[str, Any]) -> float | None:
    return row["step"]["median"] if "median" in row.get("step", {}) else row.get("median")


def _memory(row: dict[str, Any]) -> float | None:
    if "peak_bytes" in row.get("memory", {}):
        return row["memory"]["peak_bytes"] - row["memory"]["start_bytes"]
    return row.get("peak_extra_bytes", row.get("peak_bytes"))


def _leaves(value: Any, kind: str) -> Iterator[Value]:
    if isinstance(value, dict):
        kind = _KINDS.get(str(value.get("unit")), kind)
        if {"right", "questions"} <= value.keys() and isinstance(value["right"], int):
            yield Value("", value["right"] / value["questions"])
        if {"peak_bytes", "start_bytes"} <= value.keys():
            yield Value("bytes", value["peak_bytes"] - value["start_bytes"])
        for name, part in value.items():
            named = [found for word, found in _WORDS.items() if word in name]
            yield from _leaves(part, named[0] if named else kind if name in _OF_THE_UNIT else "")
        if value and all(seed.isdigit() for seed in value):
            yield from (Value(kind, number) for number in _over_seeds(list(value.values())))
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(part, kind)
        yield from (Value(kind, number) for number in _over_seeds(value))
        if value and all(isinstance(part, dict) and {"right", "questions"} <= part.keys() for part in value):
            yield Value("", sum(part["right"] for part in value) / sum(part["questions"] for part in value))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield Value(kind, float(value))


def _over_seeds(runs: list[Any]) -> Iterator[float]:
    if 2 <= len(runs) <= 6 and all(isinstance(run, float) for run in runs):
        mean, half = statistics.fmean(runs), _STUDENT[len(runs)] * statistics.stdev(runs) / len(runs) ** 0.5
        yield from (mean, mean - half, mean + half)
    elif len(runs) > 1 and all(isinstance(run, list) and len(run) == len(runs[0]) for run in runs):
        for column in zip(*runs, strict=True):
            if all(isinstance(number, float) for number in column):
                yield statistics.median(column)


def is_given(figure: Figure, given: Collection[Value]) -> bool:
    """Whether one of the values, of the kind that the unit asks for, rounds to a figure."""
    number = abs(float(figure.text.replace(",", "").replace("−", "-")))
    places = len(figure.text.partition(".")[2])
    half = 0.5 * 10**-places * (1 + 1e-6)
    numbers = {abs(value.number) * scale for value in given for scale in _UNITS[figure.unit].get(value.kind, ())}
    return any(abs(value - number) <= half for value in numbers)


def load(name: str) -> dict[str, Any]:
    """A result by its name."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
