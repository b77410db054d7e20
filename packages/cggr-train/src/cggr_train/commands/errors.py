"""How commands end when something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from cggr_train.errors import InputError, RunError


@contextmanager
def plain_errors(*, interrupted: str) -> Iterator[None]:
    """Turn the errors a user can repair into one line and an exit code; anything else is a bug and keeps its trace.

    Args:
        interrupted: What to say after Ctrl-C where nothing handled it.
    """
    try:
        yield
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except (RunError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo(interrupted, err=True)
        raise typer.Exit(130) from error


def check_resume_options(context: typer.Context, allowed: tuple[str, ...], *, what: str) -> None:
    """Refuse options that cannot go with ``--resume``.

    Args:
        context: Of the command.
        allowed: Names of the parameters that may be given.
        what: ``run`` or ``study``.

    Raises:
        InputError: With the first option that was given nevertheless.
    """
    for name in context.params:
        source = context.get_parameter_source(name)
        if name in ("resume", *allowed) or source is None or source.name != "COMMANDLINE":
            continue
        shown = "data files" if name == "data" else f"--{name.replace('_', '-')}"
        raise InputError(f"{shown} cannot go with --resume: a {what} continues with the settings it was started with")
