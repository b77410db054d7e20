"""``cggr inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cggr_train.busy import busy
from cggr_train.commands import options
from cggr_train.commands.errors import plain_errors
from cggr_train.commands.loading import loading
from cggr_train.errors import InputError


def inspect(
    model: Annotated[
        str, typer.Option(help="Hugging Face model: a directory or a name on the hub.", show_default=False)
    ],
    text: Annotated[str, typer.Option(help="The passage, or the path of a text file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("inspect.html"),
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer directory; the model's own by default.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Directory of a reference model with the same tokenizer, for the score 'excess'.")
    ] = None,
    ratio: Annotated[float, typer.Option(help="Keep ratio of the strategies.")] = 0.25,
    router_depth: options.RouterDepth = None,
    length: Annotated[int, typer.Option(help="Maximum length of the passage, in tokens.")] = 1024,
    seed: Annotated[int, typer.Option(help="Seed of the random selections.")] = 0,
    device: options.Device = "auto",
) -> None:
    """Write an HTML page of a passage, coloured by each score, that marks the tokens each strategy would keep."""
    with plain_errors(interrupted="stopped; nothing was written"):
        with loading("inspect"):
            from rich.console import Console
            from transformers.utils.logging import disable_progress_bar

            from cggr_train.fine_tuning import local_model
            from cggr_train.inspection import inspect_text, read_passage
            from cggr_train.report.inspection_page import write_inspection_page

        disable_progress_bar()
        if out.is_dir() or not out.parent.is_dir():
            what = "is a directory" if out.is_dir() else f"cannot be written: the directory {out.parent} does not exist"
            raise InputError(f"--out {out} {what}; give the path of an HTML file")
        with busy(f"scoring the passage with {model}", Console(stderr=True)):
            found = inspect_text(
                local_model(model), read_passage(text), tokenizer=tokenizer, reference=reference, ratio=ratio,
                router_depth=router_depth, length=length, seed=seed, device=device,
            )  # fmt: skip
        write_inspection_page(out, found)
        cut = f" (the last {found.left_out:,} were left out)" if found.left_out else ""
        Console().print(f"{len(found.tokens):,} tokens{cut} · page {out}", highlight=False, soft_wrap=True)
