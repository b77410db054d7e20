"""What a command shows while its libraries are imported, which takes seconds."""

from __future__ import annotations

import os

import typer


def announce_loading(command: str) -> None:
    """Report on standard error, once per run, that the command is loading.

    Args:
        command: Name of the command.
    """
    if os.environ.get("RANK", "0") == "0":  # one line from all processes of torchrun
        typer.echo(f"cggr {command}: loading PyTorch and transformers …", err=True)
