"""Judge every language-model class of transformers: ``python -m tests.support.sweep``, or ``nox -s sweep``."""

import argparse
import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.support.sweep.cases import LENGTHS
from tests.support.sweep.judge import GRADIENT_TOLERANCE, LOSS_TOLERANCE, judge
from tests.support.sweep.page import GROUPS, group, page
from tests.support.sweep.pool import judged
from tests.support.sweep.tiny import language_model_classes

ROOT = Path(__file__).parents[3]
PAGE, RESULT = ROOT / "docs" / "supported-models.md", ROOT / "docs" / "supported-models.json"


def main() -> int:
    """Run, print what was found, write the page and the JSON file; 1 if a class is wrong."""
    options = _options()
    versions = {name: version(name) for name in ("torch", "transformers")}
    classes = language_model_classes()
    unknown = sorted(set(options.classes) - classes.keys())
    if unknown:
        raise SystemExit(f"transformers {versions['transformers']} has no such language-model classes: {unknown}")
    wanted = {name: classes[name] for name in options.classes or classes}
    notes = options.folder / f"{'-'.join(versions.values())}.jsonl"
    done = {} if options.anew else _read(notes)
    left = [(name, model_type) for name, model_type in wanted.items() if name not in done]
    console = Console()
    notes.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:32.32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        notes.open("w" if options.anew else "a", encoding="utf-8") as file,
    ):
        bar = progress.add_task("classes", total=len(wanted), completed=len(wanted) - len(left))
        for report in judged(left, judge, processes=options.processes, limit=options.limit):
            done[report["class"]] = report
            file.write(json.dumps(report) + "\n")
            file.flush()
            if group(report) == "wrong":
                _say_wrong(console, report)
            progress.update(bar, advance=1, description=report["class"])
    reports = [done[name] for name in sorted(wanted)]
    for name, (title, _) in GROUPS.items():
        console.print(f"{sum(group(report) == name for report in reports):5}  {title}", highlight=False)
    if not options.classes:
        _write(reports, versions)
        console.print(f"wrote {PAGE.relative_to(ROOT)} and {RESULT.relative_to(ROOT)}")
    return int(any(group(report) == "wrong" for report in reports))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.support.sweep", description=__doc__)
    parser.add_argument("classes", nargs="*", help="only these; the page is then not written")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for one class")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "sweep", help="where a run is taken up again")
    parser.add_argument("--anew", action="store_true", help="forget what an earlier run found on the same versions")
    return parser.parse_args()


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    reports = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {report["class"]: report for report in reports}


def _say_wrong(console: Console, report: dict[str, Any]) -> None:
    for line in report["found"]:
        if line["verdict"] == "wrong":
            case = f"{line['mode']}, {line['layout']}, {line['length']} tokens"
            console.print(f"[red]wrong[/] {report['class']}, {case}: {line['detail']}", highlight=False)


def _write(reports: list[dict[str, Any]], versions: dict[str, str]) -> None:
    facts = {
        "lengths": ", ".join(map(str, LENGTHS)),
        "loss": LOSS_TOLERANCE,
        "gradient": GRADIENT_TOLERANCE,
    }
    _replace(PAGE, page(reports, versions, **facts))
    environment = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
    }
    found = {
        report["class"]: {"group": group(report), **{key: report[key] for key in ("model_type", "built", "found")}}
        for report in reports
    }
    _replace(RESULT, json.dumps({"environment": environment, "lengths": LENGTHS, "classes": found}, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
