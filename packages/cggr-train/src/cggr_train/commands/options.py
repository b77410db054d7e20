"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SELECTIONS = "stratified, sampled, random, topk or sequence_aware"
SCORINGS = "gradnorm, combined, loss, entropy or margin"

Data = Annotated[
    list[Path] | None, typer.Argument(help="Text, .jsonl or .parquet files to train on.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option(help="Hugging Face model to fine-tune: a directory, GGUF too, or a name on the hub."),
]
Config = Annotated[
    str | None, typer.Option(help="Train from scratch: nano, micro, tiny, small, base, large, or a config.json.")
]
Tokenizer = Annotated[
    str | None, typer.Option(help="Tokenizer directory; by default the model's own, or one trained on the data.")
]
VocabSize = Annotated[int, typer.Option(help="Vocabulary size of a tokenizer trained on the data.")]
Field = Annotated[
    str,
    typer.Option(
        help="Key or column of the text. With --model, a,b is a masked prompt and its answer; else both are joined."
    ),
]
Answer = Annotated[
    str | None,
    typer.Option(help="Key or column of the answer; only the answer is supervised, and --field names the question."),
]
Messages = Annotated[
    str | None,
    typer.Option(
        help="Key of a list of chat messages: the chat template is applied, and the assistant's turns are supervised."
    ),
]
Heldout = Annotated[list[Path] | None, typer.Option(help="Held-out file instead of a share of the data; repeatable.")]
HeldoutFraction = Annotated[float, typer.Option(help="Share of the documents held out.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip unusable lines and count them.")]
RouterDepth = Annotated[int | None, typer.Option(help="Score with the first N layers; all by default.")]
ContextPrecision = Annotated[
    str | None,
    typer.Option(
        help="fp8: run linear layers in FP8 on tokens that need no gradient (kv and detached).",
        show_default=False,
    ),
]
ContextMargin = Annotated[
    int,
    typer.Option(
        help="Let gradients also reach this many tokens before each supervised stretch (kv and detached, selection "
        "supervised)."
    ),
]
Length = Annotated[int, typer.Option(help="Tokens per sequence.")]
BatchSize = Annotated[int, typer.Option(help="Sequences per batch.")]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="Peak learning rate of AdamW: 1e-3 from scratch, 5e-5 to 1e-5 by size with --model.", show_default=False
    ),
]
WeightDecay = Annotated[
    float | None,
    typer.Option(help="Weight decay of matrices: 0.1 from scratch, 0.01 with --model.", show_default=False),
]
Clip = Annotated[float, typer.Option(help="Clip gradients to this norm; 0 disables clipping.")]
EvalSequences = Annotated[int, typer.Option(help="Held-out sequences per evaluation.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16 (autocast).")]
CudaGraph = Annotated[
    bool | None,
    typer.Option(
        help="Capture the whole step as one CUDA graph, or nothing. Default: capture the passes if that is faster.",
        show_default=False,
    ),
]
