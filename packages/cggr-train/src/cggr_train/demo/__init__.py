"""``cggr demo``: a small study on text that every machine with Python has."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cggr_train.demo.corpus import standard_library
from cggr_train.inspection import inspect_text
from cggr_train.study import StudySettings, start_study
from cggr_train.study.run import StudyResult

__all__ = ["HELDOUT_EVERY", "choose_passage", "run_demo", "write_corpus"]

HELDOUT_EVERY = 16


def run_demo(settings: StudySettings, folder: Path, console: Console) -> StudyResult:
    """Run the study and write the page of a held-out passage beside it.

    Args:
        settings: Of the study, on the files that :func:`write_corpus` wrote.
        folder: Of the study.
        console: Where progress, table and verdict are shown.

    Raises:
        InputError: If a setting cannot be used.
        RunError: If a run fails, with what it printed last.
    """
    from cggr_train.report.inspection_page import write_inspection_page

    result = start_study(settings, folder, console)
    if result.exit_code == 0:
        heldout = Path(settings.train.heldout[0]).read_text(encoding="utf-8").splitlines()
        passage = choose_passage([json.loads(line)["text"] for line in heldout])
        routing, seed = settings.train.routing, settings.train.seed
        found = inspect_text(
            str(folder / "runs" / f"standard-seed{seed}" / "model"), passage, ratio=settings.ratios[0],
            router_depth=routing.router_depth, length=settings.train.length, seed=seed,
        )  # fmt: skip
        write_inspection_page(folder / "passage.html", found)
        console.print(f"a held-out passage: {folder / 'passage.html'}", highlight=False, soft_wrap=True)
    return result


def write_corpus(folder: Path, *, max_characters: int, roots: Sequence[Path] = ()) -> tuple[Path, Path]:
    """Write the standard library's source as JSON Lines, every sixteenth file into the held-out part.

    Args:
        folder: Made if missing.
        max_characters: How much of it, see :func:`cggr_train.demo.corpus.standard_library`.
        roots: Further folders of source, such as packages'; so much of each.

    Returns:
        Paths of the text to train on and of the held-out text.

    Raises:
        InputError: If this Python came without its source.
    """
    files = standard_library(max_characters=max_characters)
    for root in roots:
        files += standard_library(max_characters=max_characters, root=root)
    heldout, train = files[::HELDOUT_EVERY], [text for n, text in enumerate(files) if n % HELDOUT_EVERY]
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "corpus.jsonl", folder / "heldout.jsonl"
    for path, texts in zip(paths, (train, heldout), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return paths


def choose_passage(texts: list[str], *, characters: int = 2000) -> str:
    """A stretch of code from the longest text: from the first definition after its first quarter.

    Args:
        texts: Held-out documents; at least one.
        characters: Length wanted.
    """
    text = max(texts, key=len)
    quarter = len(text) // 4
    starts = [found for mark in ("\ndef ", "\nclass ", "\n") if (found := text.find(mark, quarter)) >= 0]
    start = starts[0] + 1 if starts else 0
    return text[start : start + characters] or text[:characters]
