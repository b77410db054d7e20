"""The ``cggr`` command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from cggr_train import __version__
from cggr_train.errors import InputError, RunError

app = typer.Typer(
    name="cggr",
    help="Train transformers on the tokens worth learning from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the ``cggr`` console script."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cggr-train {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    context: typer.Context,
    data: Annotated[
        list[Path] | None, typer.Argument(help="Text, .jsonl or .parquet files to train on.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run: checkpoints, log, curve.")] = Path("cggr-run"),
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder; only --steps and --seconds may go with it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Directory of a Hugging Face model to train on.")] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Train from scratch: nano, micro, tiny, small, base, large, or a config.json."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer directory; without it the model's own, or one trained on the data.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(help="Size of a tokenizer trained on the data.")] = 8192,
    field: Annotated[str, typer.Option(help="Key or column that holds the text; a,b joins two.")] = "text",
    heldout: Annotated[
        list[Path] | None, typer.Option(help="Files held out for evaluation, instead of a share of the data.")
    ] = None,
    heldout_fraction: Annotated[float, typer.Option(help="Share of the documents held out.")] = 0.02,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out and count lines that are unusable.")] = False,
    method: Annotated[str, typer.Option(help="cggr, random (same keep ratio, no score) or standard.")] = "cggr",
    gradient: Annotated[str, typer.Option(help="Gradient mode: kv, detached, exact or sequence.")] = "kv",
    ratio: Annotated[float, typer.Option(help="Keep ratio: kept tokens / countable tokens.")] = 0.25,
    selection: Annotated[str, typer.Option(help="How kept tokens are chosen from the scores.")] = "stratified",
    scoring: Annotated[str, typer.Option(help="Which score.")] = "gradnorm",
    router_depth: Annotated[
        int | None, typer.Option(help="Score with the first N layers only; without it with all of them.")
    ] = None,
    ratio_warmup_steps: Annotated[int, typer.Option(help="Steps from keep ratio 1 down to --ratio.")] = 0,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences of a batch.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in all. No budget: one pass.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Seconds of training in all.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 1e-3,
    lr_warmup: Annotated[float, typer.Option(help="Share of the budget spent warming up.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of matrices.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 switches clipping off.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and selections.")] = 0,
    log_every: Annotated[int, typer.Option(help="Steps between two log records.")] = 10,
    eval_every: Annotated[int, typer.Option(help="Steps between two evaluations.")] = 100,
    eval_sequences: Annotated[int, typer.Option(help="Held-out sequences per evaluation.")] = 64,
    save_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 200,
    keep: Annotated[int, typer.Option(help="Newest checkpoints to keep.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32 or bfloat16 (autocast).")] = "auto",
) -> None:
    """Train a causal language model on text, JSON Lines or Parquet files.

    Ctrl-C stops after the current step and saves a checkpoint (exit code 130); a second one stops at once.
    """
    with _plain_errors():
        if resume is not None:
            _only_budget_with_resume(context)
        from rich.console import Console
        from transformers.utils.logging import disable_progress_bar

        from cggr_train.learner import Routing
        from cggr_train.run import resume_run, start_run
        from cggr_train.settings import TrainSettings

        disable_progress_bar()  # its bars for saving a model would break ours
        console = Console()
        if resume is not None:
            result = resume_run(resume, console, steps=steps, seconds=seconds)
            folder = resume
        else:
            settings = TrainSettings(
                data=tuple(map(str, data or ())),
                model=model,
                config=config,
                tokenizer=tokenizer,
                vocab_size=vocab_size,
                field=field,
                heldout=tuple(map(str, heldout or ())),
                heldout_fraction=heldout_fraction,
                skip_bad=skip_bad,
                method=method,
                routing=Routing(gradient, ratio, selection, scoring, router_depth, ratio_warmup_steps),
                length=length,
                batch_size=batch_size,
                accumulate=accumulate,
                steps=steps,
                seconds=seconds,
                learning_rate=learning_rate,
                lr_warmup=lr_warmup,
                weight_decay=weight_decay,
                clip=clip,
                seed=seed,
                log_every=log_every,
                eval_every=eval_every,
                eval_sequences=eval_sequences,
                save_every=save_every,
                keep=keep,
                device=device,
                precision=precision,
            )
            result = start_run(settings, out, console)
            folder = out
        where = f"checkpoint {result.checkpoint} · log and curve in {folder}"
        if result.exit_code:
            console.print(
                f"stopped at step {result.progress.step:,} · {where}\ncontinue with: cggr train --resume {folder}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
            raise typer.Exit(result.exit_code)
        console.print(
            f"done: {result.progress.step:,} steps, held-out loss {result.heldout_loss:.4f} · {where}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("cggr-demo"),
    seconds: Annotated[float, typer.Option(help="Training time of each of the four methods, on one core.")] = 64.0,
    gradient: Annotated[str, typer.Option(help="Gradient mode: kv, detached, exact or sequence.")] = "kv",
    ratio: Annotated[float, typer.Option(help="Keep ratio of random and CGGR.")] = 0.25,
    selection: Annotated[str, typer.Option(help="How CGGR chooses from the scores.")] = "stratified",
    scoring: Annotated[str, typer.Option(help="Which score.")] = "gradnorm",
    router_depth: Annotated[
        int | None, typer.Option(help="Score with the first N layers only; without it with all of them.")
    ] = None,
    config: Annotated[str, typer.Option(help="Model size: nano, micro, tiny, …")] = "micro",
    vocab_size: Annotated[int, typer.Option(help="Size of the tokenizer.")] = 1024,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences of a batch, even.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate, the same for all.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed of weights, data order and selections.")] = 0,
    characters: Annotated[int, typer.Option(help="How much of the standard library's source to use.")] = 4_000_000,
) -> None:
    """Train a small model on Python's own source in four ways, the same time each, and compare.

    Writes results.json, comparison.png and demo.html; about three minutes on two CPU cores.
    """
    with _plain_errors():
        from rich.console import Console
        from transformers.utils.logging import disable_progress_bar

        from cggr_train.demo import DemoSettings, run_demo
        from cggr_train.learner import Routing

        settings = DemoSettings(
            seconds=seconds,
            routing=Routing(gradient, ratio, selection, scoring, router_depth),
            preset=config,
            vocab_size=vocab_size,
            length=length,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            max_characters=characters,
        )
        disable_progress_bar()
        run_demo(settings, out, Console())


def _only_budget_with_resume(context: typer.Context) -> None:
    given = [
        name
        for name in context.params
        if name not in ("resume", "steps", "seconds")
        and (source := context.get_parameter_source(name)) is not None
        and source.name == "COMMANDLINE"
    ]
    if given:
        name = "data files" if given[0] == "data" else f"--{given[0].replace('_', '-')}"
        raise InputError(f"{name} cannot go with --resume: a run continues with the settings it was started with")


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn the errors a user can repair into one line and an exit code; anything else is a bug and keeps its trace."""
    try:
        yield
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except RunError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo("stopped; nothing was saved", err=True)
        raise typer.Exit(130) from error


if __name__ == "__main__":
    main()
