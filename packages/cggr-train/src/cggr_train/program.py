"""How the user calls the command that is running."""

from __future__ import annotations

import sys
from pathlib import Path


def program() -> str:
    """``cggr``, or its path where it lies below the current directory, in an environment that a shell may not know.

    Example:
        >>> program()
        'cggr'
    """
    path = Path(sys.argv[0]).absolute()
    if path.stem != "cggr" or not path.is_relative_to(Path.cwd()):
        return "cggr"
    return str(path.relative_to(Path.cwd()))
