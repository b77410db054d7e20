"""The demo from beginning to end: text, tokenizer, four runs one after another, table, picture, page."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from cggr_train.data import TokenStore, build_token_store
from cggr_train.demo.corpus import standard_library
from cggr_train.demo.verdict import results_table, verdict
from cggr_train.demo.worker import RunSpec
from cggr_train.display import bar, numbers
from cggr_train.errors import InputError
from cggr_train.learner import Routing
from cggr_train.tokenizer import train_tokenizer

LABELS = {
    "standard": "standard",
    "half_batch": "half the batch",
    "random": "random tokens",
    "cggr": "CGGR",
}
"""The compared methods, in the order in which they run; names for people."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo compares.

    Attributes:
        seconds: Training time of each method.
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

    seconds: float = 32.0
    routing: Routing = dataclasses.field(default_factory=Routing)
    preset: str = "micro"
    vocab_size: int = 2048
    length: int = 256
    batch_size: int = 16
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
        RuntimeError: If a run fails, with what it printed last.
    """
    from cggr_train.report.curves import draw_comparison
    from cggr_train.report.page import write_page
    from cggr_train.report.passage import choose_passage, score_passage

    folder.mkdir(parents=True, exist_ok=True)
    console.print("reading the standard library's source and training a tokenizer …", highlight=False)
    texts = standard_library(max_characters=settings.max_characters)
    tokenizer = train_tokenizer(texts, vocab_size=settings.vocab_size)
    tokens = build_token_store(texts, tokenizer, folder / "tokens", length=settings.length, heldout_fraction=0.05)
    console.print(
        f"{len(texts):,} files, {len(tokens.train):,} tokens to train on, {len(tokens.heldout):,} held out "
        f"(other files); {settings.seconds:g} s for each method",
        highlight=False,
    )
    specs = _specs(settings, folder, vocab_size=len(tokenizer))
    results = _run_all(specs, folder, console)

    curves = {result["name"]: result["curve"] for result in results}
    draw_comparison(curves, LABELS, folder / "comparison.png")
    (folder / "results.json").write_text(
        json.dumps({"settings": dataclasses.asdict(settings), "results": results}, indent=1) + "\n", encoding="utf-8"
    )
    lines = verdict(results, LABELS)
    text = choose_passage(_heldout_texts(tokens, tokenizer))
    passage = score_passage(folder / "model", tokenizer, text, settings.routing, length=settings.length,
                            seed=settings.seed)  # fmt: skip
    write_page(folder / "demo.html", results=results, labels=LABELS, verdict=lines, passage=passage,
               picture=folder / "comparison.png", settings=settings)  # fmt: skip
    console.print(results_table(results, LABELS, seconds=settings.seconds))
    for line in lines:
        console.print(line, highlight=False)
    console.print(f"picture {folder / 'comparison.png'} · page {folder / 'demo.html'}", highlight=False, soft_wrap=True)
    return results


def _specs(settings: DemoSettings, folder: Path, *, vocab_size: int) -> list[RunSpec]:
    def spec(name: str) -> RunSpec:
        return RunSpec(
            name=name,
            method="standard" if name == "half_batch" else name,
            batch_size=settings.batch_size // 2 if name == "half_batch" else settings.batch_size,
            routing=settings.routing,
            tokens=str(folder / "tokens"),
            out=str(folder),
            preset=settings.preset,
            vocab_size=vocab_size,
            length=settings.length,
            seconds=settings.seconds,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            save_model=name == "cggr",
        )

    return [spec(name) for name in LABELS]


def _run_all(specs: list[RunSpec], folder: Path, console: Console) -> list[dict[str, Any]]:
    results = []
    with bar(console) as progress:
        tasks = {spec.name: progress.add_task(LABELS[spec.name], total=1.0, start=False, numbers="") for spec in specs}
        for spec in specs:
            task, before = tasks[spec.name], {"tokens": 0, "seconds": 0.0}
            progress.start_task(task)

            def show(record: dict[str, Any], task: Any = task, before: dict[str, Any] = before) -> None:
                rate = (record["tokens"] - before["tokens"]) / max(record["seconds"] - before["seconds"], 1e-9)
                before.update(tokens=record["tokens"], seconds=record["seconds"])
                text = numbers(step=record["step"], loss=record["loss"], keep_ratio=record["keep_ratio"],
                               tokens_per_second=rate, memory=record["memory"])  # fmt: skip
                progress.update(task, completed=min(1.0, record["spent"]), numbers=text)

            results.append(_run_one(spec, folder, show))
    return results


def _run_one(spec: RunSpec, folder: Path, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    path = folder / f"{spec.name}.json"
    result_path = path.with_suffix(".result.json")
    result_path.unlink(missing_ok=True)
    path.write_text(spec.to_json(), encoding="utf-8")
    errors = folder / f"{spec.name}.errors.txt"
    with errors.open("w", encoding="utf-8") as error_file:
        command = [sys.executable, "-m", "cggr_train.demo.worker", str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=error_file, text=True)
        assert process.stdout is not None
        try:
            with process.stdout:
                for line in process.stdout:
                    if line.startswith("{"):
                        show(json.loads(line))
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code != 0 or not result_path.exists():
        last = errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the run {spec.name!r} failed (exit code {code}): {' '.join(last)}; see {errors}")
    result = json.loads(result_path.read_text(encoding="utf-8"))
    for leftover in (path, result_path, errors):
        leftover.unlink()
    return result


def _heldout_texts(tokens: TokenStore, tokenizer: Any) -> list[str]:
    ids = tokens.heldout.tolist()
    texts, start = [], 0
    for position, token in enumerate(ids):
        if token == tokenizer.eos_token_id:
            texts.append(tokenizer.decode(ids[start:position]))
            start = position + 1
    if start < len(ids):
        texts.append(tokenizer.decode(ids[start:]))
    return texts
