"""Real text that every machine with Python has: the source of its standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

from cggr_train.errors import InputError

LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
)
"""Skipped: installed packages and tests, which differ between installations, and data tables, which are not text."""


def standard_library(*, max_characters: int, root: Path | None = None) -> list[str]:
    """Source files of the standard library, each once.

    Files are taken in the order of a hash of their text, so a limit takes a random sample of files that is the
    same on every machine with the same Python; equal files are taken once, and files under 200 characters are skipped.

    Args:
        max_characters: Stop once this many characters are reached.
        root: Another folder to read instead.

    Returns:
        Texts of whole files.

    Raises:
        InputError: If there is no source to read (a zipped or stripped Python).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    texts: dict[str, str] = {}
    for path in root.rglob("*.py"):
        if LEFT_OUT.intersection(path.relative_to(root).parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if len(text) >= 200:
            texts[hashlib.sha256(text.encode()).hexdigest()] = text
    if not texts:
        raise InputError(f"no Python source under {root}; this Python has no source of its standard library")
    chosen, total = [], 0
    for digest in sorted(texts):
        chosen.append(texts[digest])
        total += len(texts[digest])
        if total >= max_characters:
            break
    return chosen
