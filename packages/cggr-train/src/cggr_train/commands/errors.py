"""How commands end when something goes wrong."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from cggr_train.errors import InputError, RunError


@contextmanager
def plain_errors(*, interrupted: str) -> Iterator[None]:
    """Show errors that a user can fix as one line with an exit code; anything else is a bug and keeps its traceback.

    Args:
        interrupted: Message after a Ctrl-C that nothing else handled.
    """
    try:
        yield
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except (RunError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            text = f"the disk is full ({error}); free some space, and continue with --resume or start again"
        typer.echo(f"error: {text}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo(interrupted, err=True)
        raise typer.Exit(130) from error


def was_given(context: typer.Context, name: str) -> bool:
    """Whether a parameter was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_resume_options(context: typer.Context, allowed: tuple[str, ...], *, what: str) -> None:
    """Refuse options that cannot be combined with ``--resume``.

    Args:
        context: Context of the command.
        allowed: Names of the parameters that are allowed.
        what: ``run`` or ``study``.

    Raises:
        InputError: Naming the first option that is not allowed.
    """
    for name in context.params:
        if name in ("resume", *allowed) or not was_given(context, name):
            continue
        shown = "data files" if name == "data" else f"--{name.replace('_', '-')}"
        raise InputError(
            f"{shown} cannot be combined with --resume: a {what} continues with the settings it was started with"
        )
