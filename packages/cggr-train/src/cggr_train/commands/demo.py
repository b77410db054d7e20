"""``cggr demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cggr_train.commands import options
from cggr_train.commands.errors import plain_errors
from cggr_train.commands.loading import loading
from cggr_train.errors import InputError
from cggr_train.program import program


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("cggr-demo"),
    seconds: Annotated[float, typer.Option(help="Training time per run, on one core.")] = 20.0,
    seeds: Annotated[int, typer.Option(help="Runs (seeds) per method.")] = 3,
    gradient: Annotated[str, typer.Option(help="Gradient mode: kv, detached, exact or sequence.")] = "kv",
    ratio: Annotated[float, typer.Option(help="Keep ratio of the random control and of CGGR.")] = 0.25,
    selection: Annotated[
        str, typer.Option(help=f"How CGGR selects tokens by score: {options.SELECTIONS}.")
    ] = "stratified",
    scoring: Annotated[str, typer.Option(help=f"Which score: {options.SCORINGS}.")] = "gradnorm",
    router_depth: options.RouterDepth = None,
    config: Annotated[str, typer.Option(help="Model size: nano, micro, tiny, …")] = "nano",
    vocab_size: options.VocabSize = 257,
    length: options.Length = 128,
    batch_size: options.BatchSize = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-2,
    seed: Annotated[int, typer.Option(help="First seed.")] = 0,
    characters: Annotated[int, typer.Option(help="How much source code of the standard library to use.")] = 2_000_000,
) -> None:
    """Train a small model on Python's own source code in several ways, for the same time each, and compare.

    Writes report.html, passage.html and results.jsonl; about four minutes on two CPU cores.
    """
    typer.echo("cggr demo: a small study on this Python's own source code; no GPU, no download")
    with plain_errors(interrupted=f"stopped; continue with: {program()} study --resume {out}"):
        with loading("demo"):
            from rich.console import Console
            from transformers.utils.logging import disable_progress_bar

            from cggr_train.demo import announcement, run_demo, write_corpus
            from cggr_train.learner import Routing
            from cggr_train.settings import TrainSettings
            from cggr_train.study import StudySettings
            from cggr_train.study.pool import places

        if (out / "study.json").exists():
            raise InputError(
                f"{out} already holds a study; continue it with {program()} study --resume {out}, or give --out"
            )
        disable_progress_bar()
        console = Console()

        def settings(corpus: Path, heldout: Path) -> StudySettings:
            train = TrainSettings(
                data=(str(corpus),),
                heldout=(str(heldout),),
                config=config,
                vocab_size=vocab_size,
                routing=Routing(router_depth=router_depth),
                length=length,
                batch_size=batch_size,
                seconds=seconds,
                learning_rate=learning_rate,
                seed=seed,
                device="cpu",
            )
            return StudySettings(
                train=train,
                gradients=(gradient,),
                ratios=(ratio,),
                selections=(selection,),
                scorings=(scoring,),
                seeds=seeds,
                equal=("time",),
                controls=("equal_cost",),  # the other controls would take too long for a demo
            )

        planned = settings(out, out)  # invalid numbers are refused before anything is written
        console.print(announcement(planned, workers=len(places("cpu", None))), highlight=False, soft_wrap=True)
        console.print("reading the standard library's source …", highlight=False)
        result = run_demo(settings(*write_corpus(out, max_characters=characters)), out, console)
        if result.exit_code:
            console.print(f"stopped; continue with: {program()} study --resume {out}", highlight=False, soft_wrap=True)
            raise typer.Exit(result.exit_code)
