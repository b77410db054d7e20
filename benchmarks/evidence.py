"""What the results behind docs/evidence.md say, from the JSON files: ``python -m benchmarks.evidence [FOLDER]``.

Losses are means over seeds with 95% intervals; differences are paired by seed, and shares of right answers have the
standard error over all evaluated answers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _record
from benchmarks._evidence_tables import less, renew, right_answers, with_interval


def frontier_tables(result: Mapping[str, Any]) -> str:
    """A table for each way of taking steps, and one for all arms after the same examples."""
    rows = {name: row for name, row in result["rows"].items() if "diverged" not in row}
    settings = result["settings"]
    told = [f"### {result['benchmark']}: {settings['seeds']} seeds, {settings['seconds']:.1f} s each, "
            f"{result['environment']['device']}, {result['environment']['commit']}"]  # fmt: skip
    if before := settings.get("accuracy_before"):
        told.append(f"\nBefore training: {right_answers([before])}.")
    for basis in settings["verdict"]:
        timed = [row for row in rows.values() if basis in row]
        shares = list(timed[0][basis]["readings"])
        heads = [f"loss, {share} of the time | right" for share in shares]
        told += [f"\n{basis}: {' '.join(settings['verdict'][basis])}\n",
                 f"| step | ms | peak | steps | {' | '.join(heads)} | less the first | share of its control's time |",
                 "|---" * (6 + 2 * len(shares)) + "|"]  # fmt: skip
        first = timed[0][basis]["readings"][shares[-1]]["losses"]
        for row in timed:
            own = row[basis]
            read = [f"{with_interval(found['losses'])} | {right_answers(found['accuracy'])}"
                    for found in own["readings"].values()]  # fmt: skip
            gap = less(own["readings"][shares[-1]]["losses"], first)
            reached = "; ".join(
                f"{control}: {', '.join('never' if value is None else f'{value:.2f}' for value in values)}"
                for control, values in own["share_of_the_time_of"].items()
            )
            counted = ", counted" if row.get("counted") else ""
            told.append(
                f"| {row['label']} | {own['step_seconds'] * 1e3:.0f}{counted} | {own['peak_bytes'] / 1e9:.1f} GB "
                f"| {own['readings'][shares[-1]]['steps']} | {' | '.join(read)} | {with_interval(gap, signed=True)} "
                f"| {reached} |"
            )
    equal = {name: row["equal_examples"] for name, row in rows.items()}
    first = next(iter(equal.values()))["losses"]
    told += ["\n| after the same examples | steps | loss | less the first | right |", "|---" * 5 + "|"]
    for name, found in equal.items():
        gap = less(found["losses"], first)
        told.append(
            f"| {rows[name]['label']} | {found['steps']} | {with_interval(found['losses'])} "
            f"| {with_interval(gap, signed=True)} | {right_answers(found['accuracy'])} |"
        )
    return "\n".join(told)


def by_seed(losses: Sequence[float] | Mapping[str, float]) -> dict[str, float]:
    """Losses by seed; those of a list are of the first seeds."""
    return dict(losses) if isinstance(losses, Mapping) else {str(seed): loss for seed, loss in enumerate(losses)}


def losses_table(result: Mapping[str, Any]) -> str:
    """Of a result whose rows have losses by seed, each beside the control's."""
    control = by_seed(result["rows"][result["control"]]["losses"])
    told = [f"### {result['benchmark']}: {result['environment']['device']}, {result['environment']['commit']}\n",
            "| step | cost | loss | less the control's | seeds |", "|---" * 5 + "|"]  # fmt: skip
    for name, row in result["rows"].items():
        losses = by_seed(row["losses"])
        gap = [loss - control[seed] for seed, loss in losses.items() if seed in control]
        told_gap = with_interval(gap, signed=True) if gap else ""
        told.append(
            f"| {name} | {row.get('cost', '')} | {with_interval(list(losses.values()))} | {told_gap} | {len(losses)} |"
        )
    return "\n".join(told)


def main() -> None:
    """Print them, or write a document's tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=_record.RESULTS)
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="write its tables anew instead")
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.write is not None:
        return renew(arguments.write, folder)
    for path in sorted(folder.glob("*.json")):
        result = _record.load(path.stem, folder=folder)
        if path.stem.startswith("frontier_") and "verdict" in result["settings"]:
            first = next(iter(result["rows"].values()))
            if "equal_examples" in first and "recorded" in first:
                print(frontier_tables(result), end="\n\n")
        elif path.stem.startswith(("noisy_", "context_precision_finetune", "context_precision_scratch")):
            print(losses_table(result), end="\n\n")
        elif path.stem.startswith("grpo_"):
            from benchmarks.grpo_figures import report

            print(f"### {path.stem}: {result['settings']}")
            report(result["rows"])


if __name__ == "__main__":
    main()
