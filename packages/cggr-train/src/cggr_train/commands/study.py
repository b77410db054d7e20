"""``cggr study``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cggr_train.commands import options
from cggr_train.commands.errors import check_resume_options, plain_errors, was_given
from cggr_train.commands.loading import loading
from cggr_train.errors import InputError
from cggr_train.program import program

OWN_PRECISION = "own"
SCORED = ("ratio", "scoring", "router", "router_depth")
"""Options for keeping only some of the supervised tokens."""


def study(
    context: typer.Context,
    data: options.Data = None,
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("cggr-study"),
    resume: Annotated[Path | None, typer.Option(help="Continue the study in this folder.")] = None,
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
    gradient: Annotated[str, typer.Option(help="Gradient modes to study: kv,exact,…")] = "kv",
    ratio: Annotated[str, typer.Option(help="Keep ratios to study: 0.125,0.25,…")] = "0.25",
    selection: Annotated[
        str | None,
        typer.Option(
            help=f"Selections to study: {options.SELECTIONS}; or supervised: all with a label. Random is added to "
            "those that keep a part. Default: stratified, and supervised too if prompts are masked and neither ratios "
            "nor scores are given.",
            show_default=False,
        ),
    ] = None,
    scoring: Annotated[str, typer.Option(help=f"Scores to study: {options.SCORINGS}.")] = "gradnorm",
    router: Annotated[
        str, typer.Option(help="Sources of the scores to study: full_depth,truncated,learned,remembered.")
    ] = "",
    router_depth: options.RouterDepth = None,
    context_precision: Annotated[
        str | None,
        typer.Option(
            help="Precisions to study for tokens that need no gradient: own,fp8 (GPUs of Hopper and later).",
            show_default=False,
        ),
    ] = None,
    context_margin: Annotated[
        str,
        typer.Option(help="Margins to study with --selection supervised: tokens before each supervised stretch."),
    ] = "0",
    controls: Annotated[
        str, typer.Option(help="Standard controls to include: equal_cost,checkpointed,equal_memory.")
    ] = "equal_cost,checkpointed,equal_memory",
    control_batch: Annotated[str, typer.Option(help="More batch sizes for the standard step: 1,2,…")] = "",
    seeds: Annotated[int, typer.Option(help="Runs (seeds) per arm.")] = 3,
    equal: Annotated[str, typer.Option(help="Compare runs at equal: tokens,time.")] = "tokens,time",
    steps: Annotated[int | None, typer.Option(help="Steps of the standard run.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Alternatively, training time of the standard run in seconds.")
    ] = None,
    length: options.Length = 512,
    batch_size: options.BatchSize = 8,
    learning_rate: options.LearningRate = None,
    weight_decay: options.WeightDecay = None,
    clip: options.Clip = 1.0,
    seed: Annotated[int, typer.Option(help="First seed, for weights, data order and selections.")] = 0,
    memory_limit: Annotated[
        str | None,
        typer.Option(help="Memory limit of a step, such as 24GB: each arm uses the largest micro-batch that fits."),
    ] = None,
    rates: Annotated[str, typer.Option(help="Learning rates to try; each arm uses its best one: 1e-4,3e-4,…")] = "",
    evaluate: Annotated[
        str, typer.Option("--eval", help="loss, or exact-match to also answer the held-out questions.")
    ] = "loss",
    answer_after: Annotated[
        str | None, typer.Option(help='Compare only the text after this marker in an answer: "####".')
    ] = None,
    questions: Annotated[int | None, typer.Option(help="Number of held-out questions to ask; all by default.")] = None,
    evaluations: Annotated[int, typer.Option(help="Points per curve.")] = 8,
    eval_sequences: options.EvalSequences = 64,
    draws: Annotated[int, typer.Option(help="Gradient estimates per arm and held-out batch; 0 for none.")] = 8,
    gradient_batches: Annotated[int, typer.Option(help="Held-out batches on which gradients are compared.")] = 2,
    parallel: Annotated[int | None, typer.Option(help="Runs in parallel on one device.")] = None,
    calibration_seconds: Annotated[float, typer.Option(help="How long to time each arm's step, in seconds.")] = 4.0,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    cuda_graph: options.CudaGraph = None,
) -> None:
    """Find out whether CGGR pays off on your data: settings and controls side by side, over several seeds.

    For example: cggr study data.jsonl --model path/to/model --steps 300 --ratio 0.25,0.5

    Trains every combination of --gradient, --ratio, --selection, --scoring and --router, next to the controls: standard
    training, with gradient checkpointing, with a batch of equal cost, with as many sequences as fit in the routed
    step's memory, and random tokens at the same ratio. Writes results.jsonl and report.html. Ctrl-C stops after the
    current steps and saves (exit code 130); --resume continues.
    """
    with plain_errors(interrupted=f"stopped; continue with: {program()} study --resume {resume or out}"):
        if resume is not None:
            check_resume_options(context, (), what="study")
        with loading("study"):
            from rich.console import Console
            from transformers.utils.logging import disable_progress_bar

            from cggr_train.fine_tuning import default_selections, defaults, local_model
            from cggr_train.learner import Routing
            from cggr_train.option_checks import parse_bytes
            from cggr_train.settings import TrainSettings
            from cggr_train.study import StudySettings, resume_study, start_study

        disable_progress_bar()  # its progress bars would break ours
        console = Console()
        if resume is not None:
            result = resume_study(resume, console)
        else:
            model = None if model is None else local_model(model)
            chosen = defaults(model, learning_rate=learning_rate, weight_decay=weight_decay, field=field, answer=answer)
            by_score = any(was_given(context, name) for name in SCORED) or "sequence" in gradient
            settings = StudySettings(
                train=TrainSettings(
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
                    routing=Routing(router_depth=router_depth),
                    length=length,
                    batch_size=batch_size,
                    steps=steps,
                    seconds=seconds,
                    learning_rate=chosen.learning_rate,
                    weight_decay=chosen.weight_decay,
                    clip=clip,
                    seed=seed,
                    eval_sequences=eval_sequences,
                    device=device,
                    precision=precision,
                    cuda_graph="auto" if cuda_graph is None else cuda_graph,
                ),
                gradients=split("--gradient", gradient),
                ratios=split("--ratio", ratio, float),
                selections=default_selections(chosen.answer or messages, by_score=by_score)
                if selection is None
                else split("--selection", selection),
                scorings=split("--scoring", scoring),
                routers=split("--router", router),
                context_precisions=precisions(context_precision or OWN_PRECISION),
                context_margins=split("--context-margin", context_margin, int),
                batch_sizes=split("--control-batch", control_batch, int),
                seeds=seeds,
                equal=split("--equal", equal),
                evaluations=evaluations,
                draws=draws,
                gradient_batches=gradient_batches,
                parallel=parallel,
                calibration_seconds=calibration_seconds,
                controls=split("--controls", controls),
                memory_limit=None if memory_limit is None else parse_bytes("--memory-limit", memory_limit),
                rates=split("--rates", rates, float),
                accuracy=exact_match_asked(evaluate),
                answer_after=answer_after,
                questions=questions,
            )
            result = start_study(settings, out, console)
        if result.exit_code:
            console.print(
                f"stopped; continue with: {program()} study --resume {resume or out}", highlight=False, soft_wrap=True
            )
            raise typer.Exit(result.exit_code)


def split(option: str, text: str, kind: Callable[[str], Any] = str) -> tuple[Any, ...]:
    """The parts of a comma-separated option, without duplicates.

    Raises:
        InputError: If a part has the wrong type.

    Example:
        >>> split("--ratio", "0.25, 0.5,0.25", float)
        (0.25, 0.5)
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return tuple(dict.fromkeys(kind(part) for part in parts))
    except ValueError as error:
        raise InputError(f"{option} must be numbers separated by commas, got {text!r}") from error


def precisions(text: str) -> tuple[str | None, ...]:
    """The parts of ``--context-precision``, with None for the model's own.

    Raises:
        InputError: If one is unknown.

    Example:
        >>> precisions("own,fp8")
        (None, 'fp8')
    """
    from cggr_core.settings import CONTEXT_PRECISIONS

    names = split("--context-precision", text)
    known = (OWN_PRECISION, *CONTEXT_PRECISIONS)
    strange = [name for name in names if name not in known]
    if strange:
        raise InputError(f"--context-precision must be one or more of {', '.join(known)}, got {strange[0]!r}")
    return tuple(None if name == OWN_PRECISION else name for name in names)


def exact_match_asked(evaluate: str) -> bool:
    """Whether ``--eval`` requests exact matches.

    Raises:
        InputError: If it is unknown.
    """
    if evaluate not in ("loss", "exact-match"):
        raise InputError(f"--eval must be loss or exact-match, got {evaluate!r}")
    return evaluate == "exact-match"
