"""What a command shows while something takes seconds and has no progress to report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

from rich.console import Console

EVERY = 3.0
"""Seconds between two signs of life."""


@contextmanager
def busy(what: str, console: Console) -> Iterator[None]:
    """Print what is being done; on a terminal, the seconds are added to the line until it is done.

    Plain text rather than a live display, so that progress bars of other libraries can come between.

    Args:
        what: Printed with an ellipsis.
        console: Where to.

    Example:
        >>> import sys
        >>> with busy("counting", Console(file=sys.stdout)):
        ...     total = sum(range(3))
        counting …
    """
    if not console.is_terminal:
        console.print(f"{what} …", highlight=False, soft_wrap=True)
        yield
        return
    console.print(f"{what} …", highlight=False, soft_wrap=True, end="")
    done = Event()
    clock = Thread(target=_count, args=(console, done), daemon=True)
    clock.start()
    try:
        yield
    finally:
        done.set()
        clock.join()
        console.print()


def _count(console: Console, done: Event) -> None:
    began = time.monotonic()
    while not done.wait(EVERY):
        console.print(f" {time.monotonic() - began:.0f} s …", highlight=False, soft_wrap=True, end="")
