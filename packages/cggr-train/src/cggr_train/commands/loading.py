"""What a command shows while its libraries are imported, which takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from cggr_train.busy import busy


@contextmanager
def loading(command: str) -> Iterator[None]:
    """Report on standard error, once per run, that the command is loading.

    Args:
        command: Name of the command.
    """
    if os.environ.get("RANK", "0") != "0":  # one line from all processes of torchrun
        yield
        return
    with busy(f"cggr {command}: loading PyTorch and transformers", Console(stderr=True)):
        yield
