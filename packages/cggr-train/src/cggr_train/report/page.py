"""The demo's page: one HTML file with its picture, styles and script inside, so that it opens without a network."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cggr_train.report.curves import COLOURS
from cggr_train.report.passage import Passage, PassageToken
from cggr_train.report.verdict import COLUMNS, row_cells

if TYPE_CHECKING:
    from cggr_train.demo.compare import DemoSettings


def write_page(
    path: Path,
    *,
    results: Sequence[Mapping[str, Any]],
    labels: Mapping[str, str],
    verdict: Sequence[str],
    passage: Passage,
    picture: Path,
    settings: DemoSettings,
) -> None:
    """Write the page.

    Args:
        path: HTML file to write.
        results: Figures of the runs.
        labels: Names for people.
        verdict: Sentences above the table.
        passage: The held-out passage.
        picture: PNG to embed.
        settings: What was compared.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cggr_train", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    best = min(result["heldout_loss"] for result in results)
    rows = [
        {
            "label": labels[result["name"]],
            "colour": COLOURS.get(result["name"], "#000"),
            "loss": f"{result['heldout_loss']:.3f}",
            "best": result["heldout_loss"] == best,
            "cells": row_cells(result),
        }
        for result in results
    ]
    page = environment.get_template("page.html.j2").render(
        rows=rows,
        columns=COLUMNS,
        verdict=verdict,
        passage=passage,
        tokens=[
            {"text": token.text, "figures": json.dumps(figures(token), ensure_ascii=False), "token": token}
            for token in passage.tokens
        ],
        picture=base64.b64encode(picture.read_bytes()).decode(),
        settings=settings,
    )
    path.write_text(page, encoding="utf-8")


def figures(token: PassageToken) -> list[tuple[str, str]]:
    """What pointing at a token shows: names and values.

    Example:
        >>> figures(PassageToken("def", 0))
        [('token', 'def'), ('position', '0'), ('score', 'none: nothing comes before it')]
    """
    shown = [("token", visible(token.text)), ("position", str(token.position))]
    if token.score is None:
        return [*shown, ("score", "none: nothing comes before it")]
    return [
        *shown,
        ("kept", f"yes, weight {token.weight:.2f}" if token.kept else "no"),
        ("score", f"{token.score:.3f}"),
        ("loss", f"{token.nll:.2f} nats"),
        ("entropy", f"{token.entropy:.2f} nats"),
        ("confidence", f"{token.confidence:.0%}"),
        ("margin", f"{token.margin:.2f}"),
        ("gradient norm", f"{token.gradnorm:.3f}"),
        ("guess", visible(token.guess)),
    ]


def visible(text: str) -> str:
    r"""Text with its white space made visible.

    Example:
        >>> visible(" x\n")
        '␣x⏎'
    """
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥") or "(part of a character)"
