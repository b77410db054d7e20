"""Results of a sweep with one version of transformers: a JSON file per version, one class per line."""

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Report = Mapping[str, Any]


@dataclass
class Results:
    """Classes of one version.

    Attributes:
        environment: ``date``, ``python``, ``system``, ``torch`` and ``transformers``.
        classes: By name: ``model_type``, ``built`` (``None``, or why not), ``found``: mappings with ``mode``,
            ``layout``, ``verdict``, ``lengths`` and ``detail``, which is that of the first length.
    """

    environment: dict[str, str]
    classes: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def version(self) -> str:
        """Of transformers."""
        return self.environment["transformers"]

    def add(self, reports: Iterable[Report]) -> None:
        """Take in what :func:`tests.support.sweep.judge.judge` returned, in the place of what was there."""
        for report in reports:
            found: dict[tuple[str, ...], dict[str, Any]] = {}
            for line in report["found"]:
                key = tuple(line[name] for name in ("mode", "layout", "verdict"))
                fields = {name: line[name] for name in ("mode", "layout", "verdict")}
                found.setdefault(key, {**fields, "lengths": [], "detail": line["detail"]})
                found[key]["lengths"].append(line["length"])
            kept = {name: report[name] for name in ("model_type", "built")}
            self.classes[report["class"]] = {**kept, "found": list(found.values())}


def file_of(folder: Path, version: str) -> Path:
    """Where the results with a version of transformers are."""
    return folder / f"transformers-{version}.json"


def read(path: Path) -> Results:
    """The results in a file."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Results(kept["environment"], kept["classes"])


def write(folder: Path, results: Results) -> Path:
    """Write a file of results whole."""
    path = file_of(folder, results.version)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(results.classes[name])}" for name in sorted(results.classes))
    replace(path, f'{{"environment": {json.dumps(results.environment)},\n"classes": {{\n{lines}\n}}}}\n')
    return path


def environment(versions: Mapping[str, str]) -> dict[str, str]:
    """What is true of a run from now on."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        **versions,
    }


def replace(path: Path, text: str) -> None:
    """Write a file whole, or leave what is there."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
