"""``cggr train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cggr_train.commands import options
from cggr_train.commands.errors import check_resume_options, plain_errors, was_given
from cggr_train.commands.loading import loading
from cggr_train.program import program

SCORED = ("ratio", "scoring", "router", "router_depth", "ratio_warmup_steps")
"""Options that are meaningless or unsupported if all supervised tokens are kept."""


def train(
    context: typer.Context,
    data: options.Data = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log and learning curve.")] = Path("cggr-run"),
    resume: Annotated[
        Path | None,
        typer.Option(help="Continue the run in this folder; only --steps and --seconds can be changed."),
    ] = None,
    model: options.Model = None,
    config: options.Config = None,
    tokenizer: options.Tokenizer = None,
    vocab_size: options.VocabSize = 8192,
    field: options.Field = "text",
    answer: options.Answer = None,
    messages: options.Messages = None,
    heldout: options.Heldout = None,
    heldout_fraction: options.HeldoutFraction = 0.02,
    skip_bad: options.SkipBad = False,
    method: Annotated[str, typer.Option(help="cggr, random (same keep ratio, no scores) or standard.")] = "cggr",
    gradient: Annotated[str, typer.Option(help="Gradient mode: kv, detached, exact or sequence.")] = "kv",
    ratio: Annotated[float, typer.Option(help="Keep ratio: kept tokens / countable tokens.")] = 0.25,
    selection: Annotated[
        str | None,
        typer.Option(
            help=f"How kept tokens are selected by score: {options.SELECTIONS}; or supervised: all with a label. "
            "Default: stratified, or supervised if prompts are masked and neither ratio nor scores are given.",
            show_default=False,
        ),
    ] = None,
    scoring: Annotated[str, typer.Option(help=f"Which score: {options.SCORINGS}.")] = "gradnorm",
    router: Annotated[
        str | None,
        typer.Option(
            help="Source of the scores: full_depth, truncated, learned or remembered (over several epochs). Default: "
            "full_depth, or truncated with --router-depth."
        ),
    ] = None,
    router_depth: options.RouterDepth = None,
    ratio_warmup_steps: Annotated[
        int, typer.Option(help="Steps over which the keep ratio falls from 1 to --ratio.")
    ] = 0,
    context_precision: options.ContextPrecision = None,
    context_margin: options.ContextMargin = 0,
    length: options.Length = 512,
    batch_size: options.BatchSize = 8,
    accumulate: Annotated[int, typer.Option(help="Batches per optimizer step.")] = 1,
    steps: Annotated[
        int | None, typer.Option(help="Total optimizer steps; without --steps or --seconds, one pass over the data.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Total seconds of training.")] = None,
    learning_rate: options.LearningRate = None,
    lr_warmup: Annotated[float, typer.Option(help="Learning-rate warm-up, as a share of training.")] = 0.05,
    weight_decay: options.WeightDecay = None,
    clip: options.Clip = 1.0,
    seed: Annotated[int, typer.Option(help="Seed for weights, data order and selections.")] = 0,
    log_every: Annotated[int, typer.Option(help="Steps between log records.")] = 10,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 100,
    eval_sequences: options.EvalSequences = 64,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    keep: Annotated[int, typer.Option(help="Number of most recent checkpoints to keep.")] = 2,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    cuda_graph: options.CudaGraph = None,
) -> None:
    """Train a causal language model on text, JSON Lines or Parquet files.

    For example: cggr train data/*.txt --config tiny --out run

    Ctrl-C stops after the current step and saves a checkpoint (exit code 130); a second one stops at once.
    """
    with plain_errors(interrupted="stopped; nothing was saved"):
        if resume is not None:
            check_resume_options(context, ("steps", "seconds"), what="run")
        with loading("train"):
            from rich.console import Console
            from transformers.utils.logging import disable_progress_bar

            from cggr_train.fine_tuning import announce, default_selection, defaults, local_model
            from cggr_train.learner import Routing
            from cggr_train.run import resume_run, start_run
            from cggr_train.settings import TrainSettings

        disable_progress_bar()  # its progress bars would break ours
        console = Console()
        if resume is not None:
            result = resume_run(resume, console, steps=steps, seconds=seconds)
            folder = resume
        else:
            model = None if model is None else local_model(model)
            chosen = defaults(model, learning_rate=learning_rate, weight_decay=weight_decay, field=field, answer=answer)
            if selection is None:
                by_score = any(was_given(context, name) for name in SCORED) or gradient == "sequence"
                selection = default_selection(chosen.answer or messages, by_score=by_score or cuda_graph is True)
            if model is not None:
                console.print(announce(chosen, lr_warmup, messages), highlight=False)
            settings = TrainSettings(
                data=tuple(map(str, data or ())),
                model=model,
                config=config,
                tokenizer=tokenizer,
                vocab_size=vocab_size,
                field=chosen.field,
                answer=chosen.answer,
                messages=messages,
                heldout=tuple(map(str, heldout or ())),
                heldout_fraction=heldout_fraction,
                skip_bad=skip_bad,
                method=method,
                routing=Routing(
                    gradient,
                    ratio,
                    selection,
                    scoring,
                    router_depth,
                    ratio_warmup_steps,
                    router,
                    context_precision,
                    context_margin=context_margin,
                ),
                length=length,
                batch_size=batch_size,
                accumulate=accumulate,
                steps=steps,
                seconds=seconds,
                learning_rate=chosen.learning_rate,
                lr_warmup=lr_warmup,
                weight_decay=chosen.weight_decay,
                clip=clip,
                seed=seed,
                log_every=log_every,
                eval_every=eval_every,
                eval_sequences=eval_sequences,
                save_every=save_every,
                keep=keep,
                device=device,
                precision=precision,
                cuda_graph="auto" if cuda_graph is None else cuda_graph,
            )
            result = start_run(settings, out, console)
            folder = out
        where = f"checkpoint {result.checkpoint} · log and curve in {folder}"
        if result.exit_code:
            console.print(
                f"stopped at step {result.progress.step:,} · {where}\n"
                f"continue with: {program()} train --resume {folder}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
            raise typer.Exit(result.exit_code)
        console.print(
            f"done: {result.progress.step:,} steps, held-out loss {result.heldout_loss:.4f} · {where}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
