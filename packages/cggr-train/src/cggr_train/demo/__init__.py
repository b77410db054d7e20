"""``cggr demo``: a small study on text that every machine with Python has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from cggr_train.demo.corpus import standard_library
from cggr_train.inspection import inspect_text
from cggr_train.presets import build_config
from cggr_train.program import program
from cggr_train.study import StudySettings, start_study
from cggr_train.study.arms import Arm, plan_arms, relative_cost
from cggr_train.study.stages import StudyResult

__all__ = ["HELDOUT_EVERY", "announcement", "choose_passage", "run_demo", "write_corpus"]

HELDOUT_EVERY = 16
OVERHEAD_SECONDS = 75.0
"""Approximate time of reading, timing every arm's step and the final comparisons on two cores."""


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
    from cggr_train.report.verdict import verdict

    result = start_study(settings, folder, console)
    if result.outcome is not None:
        heldout = Path(settings.train.heldout[0]).read_text(encoding="utf-8").splitlines()
        passage = choose_passage([json.loads(line)["text"] for line in heldout])
        routing, seed = settings.train.routing, settings.train.seed
        found = inspect_text(
            str(folder / "runs" / f"standard-seed{seed}" / "model"), passage, ratio=settings.ratios[0],
            router_depth=routing.router_depth, length=settings.train.length, seed=seed,
        )  # fmt: skip
        write_inspection_page(folder / "passage.html", found)
        console.print(
            f"passage, with the tokens that each strategy keeps: {(folder / 'passage.html').resolve()}\n\n"
            f"[bold]Found:[/] {verdict(result.outcome)[0]}\n\n"
            "Next, the same on your own data and model:\n"
            f"  {program()} study data.jsonl --model path/to/model --field question,answer --steps 300",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    return result


def announcement(settings: StudySettings, *, workers: int) -> str:
    """What the demo will do, how long it will take, and why its arms can be compared.

    Args:
        settings: Of the study; they must say how many seconds each run trains.
        workers: Runs at a time.
    """
    train = settings.train
    base = dataclasses.replace(
        train.routing, gradient=settings.gradients[0], ratio=settings.ratios[0], selection=settings.selections[0]
    )
    layers = build_config(train.config or "", vocab_size=train.vocab_size, length=train.length).num_hidden_layers
    arms = plan_arms(
        train.routing, gradients=settings.gradients, ratios=settings.ratios, selections=settings.selections,
        scorings=settings.scorings, batch_size=train.batch_size, controls=settings.controls, num_layers=layers,
    )  # fmt: skip
    runs = len(arms) * settings.seeds
    minutes = (-(-runs // workers) * (train.seconds or 0.0) + OVERHEAD_SECONDS) / 60
    random = dataclasses.replace(base, selection="random", router=None, router_depth=None)
    costs = [relative_cost(routing, num_layers=layers) for routing in (random, base)]
    smaller = [arm.batch_size for arm in arms if arm.role == "equal_cost"]
    lines = [
        f"About {max(1, round(minutes))} minutes: {len(arms)} ways to train (arms), {settings.seeds} seeds each, "
        f"{runs} runs of {train.seconds:g} s, {workers} at a time.",
        *(f"  {arm.label}: {_purpose(arm, arms)}" for arm in arms),
    ]
    if smaller:
        sizes = " and ".join(map(str, smaller))
        lines.append(
            f"Equal cost: a step that keeps {base.ratio:.0%} of the tokens takes {costs[0]:.2f} of the standard step's "
            f"operations with random tokens and {costs[1]:.2f} with scores, so the batch of {train.batch_size} shrinks "
            f"to {sizes} for the same cost."
        )
    return "\n".join(lines)


def _purpose(arm: Arm, arms: Sequence[Arm]) -> str:
    match arm.role:
        case "standard":
            return "every token in every step: the baseline that CGGR has to beat"
        case "equal_cost":
            rivals = [other.label for other in arms if other.equal_cost == arm.name]
            return f"every token, at the cost of a step of {' and '.join(rivals)}"
        case "random":
            return "that share of the tokens at random: is the score worth its cost?"
        case _:
            return "CGGR: that share of the tokens, chosen by score"


def write_corpus(folder: Path, *, max_characters: int, roots: Sequence[Path] = ()) -> tuple[Path, Path]:
    """Write the standard library's source as JSON Lines, every sixteenth file into the held-out part.

    Args:
        folder: Created if missing.
        max_characters: Number of characters, see :func:`cggr_train.demo.corpus.standard_library`.
        roots: More folders of source, such as packages'; this many characters of each.

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
