"""The page of ``cggr inspect``."""

from __future__ import annotations

from pathlib import Path

from cggr_train.inspection import Inspection
from cggr_train.report.page import visible, write_page

SHOWN = {
    "nll": ("loss", 2, "nats"),
    "entropy": ("entropy", 2, "nats"),
    "confidence": ("confidence", 3, ""),
    "margin": ("margin", 3, ""),
    "gradnorm": ("gradient norm", 3, ""),
}
"""Name, decimals and unit of each figure."""


def write_inspection_page(path: Path, found: Inspection) -> None:
    """Write a page on which the reader picks the score and strategy that colour and mark the passage.

    Args:
        path: HTML file to write.
        found: The passage.
    """
    data = {
        "tokens": [visible(token) for token in found.tokens],
        "guesses": [visible(guess) for guess in found.guesses],
        "figures": [
            {"name": SHOWN[name][0], "unit": SHOWN[name][2], "values": _rounded(values, SHOWN[name][1])}
            for name, values in found.figures.items()
        ],
        "scores": {name: _rounded(values, 4) for name, values in found.scores.items()},
        "ranks": {name: _rounded(values, 3) for name, values in found.ranks.items()},
        "weights": {
            scoring: {strategy: _rounded(values, 3) for strategy, values in by.items()}
            for scoring, by in found.weights.items()
        },
    }
    first = next(iter(found.scores))
    write_page(
        path,
        "inspect.html.j2",
        title="Which tokens of this passage would be kept?",
        found=found,
        data=data,
        scorings=list(found.scores),
        strategies=list(found.weights[first]),
        score=first,
        strategy=next(iter(found.weights[first])),
    )


def _rounded(values: list[float], decimals: int) -> list[float]:
    return [round(value, decimals) for value in values]
