"""Judge every language-model class of transformers: ``python -m tests.support.sweep``, or ``nox -s sweep``."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tests.support.sweep.cases import LENGTHS
from tests.support.sweep.judge import GRADIENT_TOLERANCE, LOSS_TOLERANCE, judge
from tests.support.sweep.page import GROUPS, group, page
from tests.support.sweep.pool import judged
from tests.support.sweep.results import Results, environment, file_of, read, replace, write
from tests.support.sweep.tiny import language_model_classes

OUTPUT = Path(__file__).parents[3] / "docs" / "supported-models"
# Where nobody watches a bar: a line each time that this many classes more are judged.
_LINE_EVERY = 10


def main() -> int:
    """Run, print what was found, write results and page; 1 if a class is wrong."""
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console()
    wrong = False
    if not options.page:
        results = _judge_classes(options, console)
        wrong = any(group(found) == "wrong" for found in results.classes.values())
        console.print(f"wrote {write(options.output, results)}", highlight=False, soft_wrap=True)
    console.print(f"wrote {_write_page(options.output)}", highlight=False, soft_wrap=True)
    return int(wrong)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.support.sweep", description=__doc__)
    parser.add_argument("classes", nargs="*", help="only these; the others' results stay as they are")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="processes")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for one class")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="folder of results and page; where an interrupted run goes on"
    )
    parser.add_argument("--anew", action="store_true", help="forget what an interrupted run found")
    parser.add_argument("--page", action="store_true", help="judge nothing: write the page of what is in --output")
    return parser.parse_args()


def _judge_classes(options: argparse.Namespace, console: Console) -> Results:
    versions = {name: version(name) for name in ("torch", "transformers")}
    classes = language_model_classes()
    unknown = sorted(set(options.classes) - classes.keys())
    if unknown:
        raise SystemExit(f"transformers {versions['transformers']} has no such language-model classes: {unknown}")
    wanted = {name: classes[name] for name in options.classes or classes}
    file = file_of(options.output, versions["transformers"])
    notes = file.with_suffix(".unfinished.jsonl")
    if options.anew:
        notes.unlink(missing_ok=True)
    done = {name: report for name, report in _noted(notes).items() if name in wanted}
    left = [(name, model_type) for name, model_type in wanted.items() if name not in done]
    if done:
        console.print(f"{len(done)} of {len(wanted)} classes were judged before (--anew forgets them)", highlight=False)
    with notes.open("a", encoding="utf-8") as noted:
        reports = judged(left, judge, processes=options.jobs, limit=options.limit)
        for report in _shown(reports, console, total=len(wanted), before=len(done)):
            done[report["class"]] = report
            noted.write(json.dumps(report) + "\n")
            noted.flush()
            if group(report) == "wrong":
                _say_wrong(console, report)
    for name, (title, _) in GROUPS.items():
        console.print(f"{sum(group(report) == name for report in done.values()):5}  {title}", highlight=False)
    results = Results(environment(versions))
    if options.classes and file.exists():
        results.classes = read(file).classes
    results.add(done.values())
    notes.unlink()
    return results


def _shown(reports: Iterable[dict[str, Any]], console: Console, *, total: int, before: int) -> Iterator[dict[str, Any]]:
    """Reports as they come, with a bar and the time left; elsewhere than on a terminal, with a line now and then."""
    columns = (TextColumn("{task.description:32.32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("classes", total=total, completed=before)
        for number, report in enumerate(reports, start=before + 1):
            yield report
            progress.update(bar, advance=1, description=report["class"])
            if not console.is_terminal and (number % _LINE_EVERY == 0 or number == total):
                left = progress.tasks[0].time_remaining
                time = "" if left is None else f", about {left:.0f} s left"
                console.print(f"{number} of {total} classes{time}", highlight=False)


def _noted(notes: Path) -> dict[str, dict[str, Any]]:
    if not notes.exists():
        return {}
    # A run that was killed leaves half a line.
    lines = [line for line in notes.read_text(encoding="utf-8").split("\n")[:-1] if line]
    return {report["class"]: report for report in map(json.loads, lines)}


def _say_wrong(console: Console, report: dict[str, Any]) -> None:
    for line in report["found"]:
        if line["verdict"] == "wrong":
            case = f"{line['mode']}, {line['layout']}, {line['length']} tokens"
            console.print(f"[red]wrong[/] {report['class']}, {case}: {line['detail']}", highlight=False)


def _write_page(folder: Path) -> Path:
    found = sorted((read(path) for path in folder.glob("transformers-*.json")), key=_order)
    if not found:
        raise SystemExit(f"{folder} holds no transformers-*.json; run the sweep first")
    path = folder / "index.md"
    facts = {"lengths": ", ".join(map(str, LENGTHS)), "loss": LOSS_TOLERANCE, "gradient": GRADIENT_TOLERANCE}
    replace(path, page(found, **facts))
    return path


def _order(results: Results) -> tuple[int, ...]:
    return tuple(int(part) for part in results.version.split(".")[:3] if part.isdecimal())


if __name__ == "__main__":
    sys.exit(main())
