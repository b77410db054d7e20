"""The demo from beginning to end: text, tokenizer, four runs in turns, table, picture, page."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cggr_train.data import build_token_store
from cggr_train.demo.corpus import standard_library
from cggr_train.demo.turns import run_in_turns
from cggr_train.demo.worker import RunSpec
from cggr_train.errors import InputError
from cggr_train.learner import Routing, build_learner
from cggr_train.presets import build_config, build_model
from cggr_train.report.verdict import results_table, verdict
from cggr_train.tokenizer import train_tokenizer

LABELS = {
    "standard": "standard",
    "half_batch": "half the batch",
    "random": "random tokens",
    "cggr": "CGGR",
}
"""The compared methods, in the order of their turns; names for people."""
HELDOUT_EVERY = 16
TURNS = 10


@dataclass(frozen=True)
class DemoSettings:
    """What the demo compares.

    Attributes:
        seconds: Training time of each method, on one core.
        routing: Gradient mode, keep ratio, selection and score; ``random`` shares the first two.
        preset: Model size.
        vocab_size: Size of the tokenizer.
        length: Tokens per sequence.
        batch_size: Sequences per step; half as many for ``half_batch``.
        learning_rate: Peak, the same for every method.
        seed: Of weights, data order and selections.
        max_characters: How much of the standard library's source to use.

    Raises:
        InputError: If ``seconds`` is not positive or ``batch_size`` cannot be halved.
    """

    seconds: float = 64.0
    routing: Routing = dataclasses.field(default_factory=Routing)
    preset: str = "micro"
    vocab_size: int = 1024
    length: int = 256
    batch_size: int = 8
    learning_rate: float = 2e-3
    seed: int = 0
    max_characters: int = 4_000_000

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise InputError(f"--seconds must be positive, got {self.seconds}")
        if self.batch_size < 2 or self.batch_size % 2:
            raise InputError(f"--batch-size must be even, so that it can be halved, got {self.batch_size}")


def run_demo(settings: DemoSettings, folder: Path, console: Console) -> list[dict[str, Any]]:
    """Run the comparison and write ``results.json``, ``comparison.png`` and ``demo.html`` into ``folder``.

    Args:
        settings: What to compare.
        folder: Made if missing; earlier results in it are replaced.
        console: Where progress, table and verdict are shown.

    Returns:
        One dictionary of figures per method, see :func:`cggr_train.demo.worker.run`.

    Raises:
        InputError: If a setting cannot be used.
        RunError: If a run fails, with what it printed last.
    """
    from cggr_train.report.curves import draw_comparison
    from cggr_train.report.page import write_page
    from cggr_train.report.passage import choose_passage, score_passage

    # refuses settings that cannot be used before anything is read or written
    probe = build_model(build_config(settings.preset, vocab_size=300, length=settings.length), seed=settings.seed)
    build_learner(probe, "cggr", settings.routing, seed=settings.seed)
    folder.mkdir(parents=True, exist_ok=True)
    console.print("reading the standard library's source and training a tokenizer …", highlight=False)
    files = standard_library(max_characters=settings.max_characters)
    heldout, train = files[::HELDOUT_EVERY], [text for n, text in enumerate(files) if n % HELDOUT_EVERY]
    tokenizer = train_tokenizer(train, vocab_size=settings.vocab_size)
    tokens = build_token_store(train, tokenizer, folder / "tokens", length=settings.length, heldout_documents=heldout)
    console.print(
        f"{len(tokens.train):,} tokens of {len(train):,} files to train on, {len(tokens.heldout):,} of "
        f"{len(heldout):,} other files held out; {settings.seconds:g} s on one core for each method, in turns",
        highlight=False,
    )
    specs = [_spec(name, settings, folder, vocab_size=len(tokenizer)) for name in LABELS]
    results = run_in_turns(specs, LABELS, folder, console)

    curves = {result["name"]: result["curve"] for result in results}
    draw_comparison(curves, LABELS, folder / "comparison.png")
    (folder / "results.json").write_text(
        json.dumps({"settings": dataclasses.asdict(settings), "results": results}, indent=1) + "\n", encoding="utf-8"
    )
    lines = verdict(results, LABELS)
    text = choose_passage(heldout)
    passage = score_passage(folder / "model", tokenizer, text, settings.routing, length=settings.length,
                            seed=settings.seed)  # fmt: skip
    write_page(folder / "demo.html", results=results, labels=LABELS, verdict=lines, passage=passage,
               picture=folder / "comparison.png", settings=settings)  # fmt: skip
    console.print(results_table(results, LABELS, seconds=settings.seconds))
    for line in lines:
        console.print(line, highlight=False)
    console.print(f"picture {folder / 'comparison.png'} · page {folder / 'demo.html'}", highlight=False, soft_wrap=True)
    return results


def _spec(name: str, settings: DemoSettings, folder: Path, *, vocab_size: int) -> RunSpec:
    half = name == "half_batch"
    return RunSpec(
        name=name,
        method="standard" if half else name,
        batch_size=settings.batch_size // 2 if half else settings.batch_size,
        routing=settings.routing,
        tokens=str(folder / "tokens"),
        out=str(folder),
        preset=settings.preset,
        vocab_size=vocab_size,
        length=settings.length,
        seconds=settings.seconds,
        turn_seconds=settings.seconds / TURNS,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        evaluations=TURNS,
        save_model=name == "cggr",
    )
