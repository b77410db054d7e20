"""The ``cggr`` command."""

from __future__ import annotations

import inspect as inspect_module
import os
from typing import Annotated

import typer

from cggr_train import __version__
from cggr_train.commands.demo import demo
from cggr_train.commands.doctor import doctor
from cggr_train.commands.inspect import inspect
from cggr_train.commands.study import study
from cggr_train.commands.train import train

app = typer.Typer(
    name="cggr",
    help="Train transformers on the tokens worth learning from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def unwrapped(text: str | None) -> str:
    r"""A docstring with one line per paragraph, so that help wraps at the terminal's width.

    Example:
        >>> unwrapped("One.\n\n    Two\n    lines.\n    ")
        'One.\n\nTwo lines.'
    """
    paragraphs = inspect_module.cleandoc(text or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


for command in (train, study, inspect, demo, doctor):
    app.command(help=unwrapped(command.__doc__))(command)


def main() -> None:
    """Entry point of the ``cggr`` console script."""
    # OpenMP reads it when torch is loaded. A thread that spins while it waits takes the core from the one it waits for:
    # beside other work on two cores, a step took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
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


if __name__ == "__main__":
    main()
