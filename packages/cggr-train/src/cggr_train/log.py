"""The JSON Lines log of a run: one object per line, appended and flushed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cggr_train.errors import SaveError


class LogError(SaveError):
    """A record could not be written; earlier ones are unchanged."""


class JsonlLog:
    """Appends records to a file that can be read during the run.

    A last line truncated by a kill is removed first, or the next record would be lost with it.

    Args:
        path: The file; its folder must exist.
        keep_until_step: Drop records of later steps first, so that a run resumed from an earlier checkpoint
            leaves no step twice; None keeps everything.
    """

    def __init__(self, path: Path, *, keep_until_step: int | None = None) -> None:
        self.path = path
        if keep_until_step is not None and path.exists():
            records = [record for record in read_log(path) if record.get("step", 0) <= keep_until_step]
            temporary = path.with_name(path.name + ".tmp")
            with self._saving():
                temporary.write_text("".join(_line(record) for record in records), encoding="utf-8")
                temporary.replace(path)
        elif path.exists() and not (written := path.read_bytes()).endswith(b"\n"):
            os.truncate(path, written.rfind(b"\n") + 1)

    def write(self, **record: Any) -> None:
        """Append one record; numbers that are not finite become null.

        Raises:
            LogError: If it cannot be written (a full disk, say).
        """
        with self._saving(), self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    @contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LogError(f"the log {self.path} could not be written: {error.strerror or error}") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """All complete records of a log; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _line(record: dict[str, Any]) -> str:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(clean) + "\n"
