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
VocabSize = Annotated[int, typer.Option(help="Size of a tokenizer trained on the data.")]
Field = Annotated[
    str,
    typer.Option(
        help="Key or column that holds the text. a,b: with --model b is the answer to a, which is masked; else joined."
    ),
]
Answer = Annotated[
    str | None,
    typer.Option(help="Key or column of the answer; --field is the question then, and the answer alone is supervised."),
]
Messages = Annotated[
    str | None,
    typer.Option(help="Key of a list of messages: in the chat template, the assistant's turns supervised."),
]
Heldout = Annotated[
    list[Path] | None, typer.Option(help="Held-out file, instead of a share of the data; repeat for several.")
]
HeldoutFraction = Annotated[float, typer.Option(help="Share of the documents held out.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip unusable lines, and count them.")]
RouterDepth = Annotated[int | None, typer.Option(help="Score with the first N layers; by default with all.")]
ContextPrecision = Annotated[
    str | None,
    typer.Option(
        help="fp8: the linear layers in FP8 where they run on tokens that need no gradient (kv and detached).",
        show_default=False,
    ),
]
Length = Annotated[int, typer.Option(help="Tokens of a sequence.")]
BatchSize = Annotated[int, typer.Option(help="Sequences of a batch.")]
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
Clip = Annotated[float, typer.Option(help="Largest gradient norm; 0 switches clipping off.")]
EvalSequences = Annotated[int, typer.Option(help="Held-out sequences per evaluation.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16 (autocast).")]
CudaGraph = Annotated[
    bool, typer.Option("--cuda-graph", help="Record the step as one CUDA graph: for small models on a GPU.")
]
