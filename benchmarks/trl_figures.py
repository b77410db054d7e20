"""The tables of savings in TRL's trainers, from the results of ``benchmarks.trl_trainers``.

``python -m benchmarks.trl_figures`` reads ``trl_trainers_*.json``, and writes the tables between the marks of
``README.md`` and ``docs/guides/trl.md``: every update against the unmodified trainer, with gradient checkpointing (its
default) and without. A row of a replayed CUDA graph is called *captured*, one whose capture did not pay *capture
tried*; all others run as they do by default.
"""

import re
from pathlib import Path
from typing import Any

from benchmarks import _record

ROOT = Path(__file__).parents[1]
CONTROL, PLAIN, ROUTED = "TRL, checkpointing", "TRL", "CGGR, kv"
MODELS = {"1b": "1B", "0.5b": "0.5B"}
TASKS = {
    "sft": "`SFTTrainer`, rows of 8,192 tokens, 10% supervised",
    "grpo_512": "`GRPOTrainer`, 16 groups of 8 completions of 1,024 tokens, prompts of 512, top 20% by entropy",
    "grpo_4096": "the same, prompts of 4,096",
    "dpo": "`DPOTrainer`, pairs of 512 tokens on prompts of 1,024",
}
BRIEFLY = {
    "sft": "`SFTTrainer`, 10% supervised",
    "grpo_512": "`GRPOTrainer`, top 20%, prompts of 512",
    "grpo_4096": "the same, of 4,096",
    "dpo": "`DPOTrainer`",
}
_MARKS = "<!-- {0} -->\n", "<!-- end of {0} -->"


def results() -> dict[tuple[str, str], dict[str, Any]]:
    """Result by task and model."""
    found = {}
    for task in TASKS:
        for model in MODELS:
            name = f"trl_trainers_{task}_{model}"
            if (_record.RESULTS / f"{name}.json").exists():
                found[task, model] = _record.load(name)
    return found


def by_label(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows of a result, named by how they ran: some results have a row called *not captured*, others *captured*."""
    labels = {}
    for name, row in result["rows"].items():
        how = row.get("captured", "no")
        end = {"no": "", "replayed": ", captured"}.get(how, ", capture tried")
        labels[name.removesuffix(", captured").removesuffix(", not captured") + end] = row
    return labels


def seconds(row: dict[str, Any] | None) -> str:
    """Median of a row, or a note that it did not fit in memory."""
    if row is None:
        return "out of memory"
    return f"{row['median'] * 1e3:,.0f} ms" if row["median"] < 1 else f"{row['median']:,.2f} s"


def times(control: dict[str, Any] | None, row: dict[str, Any]) -> str:
    """Speedup over the control."""
    return "" if control is None else f"{control['median'] / row['median']:.2f}x"


def memory(row: dict[str, Any] | None) -> str:
    """Peak above the model."""
    return "" if row is None else f"{row['peak_extra_bytes'] / 1e9:.1f}"


def short(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The README's table: one row for each task, of the larger model."""
    device = next(iter(found.values()))["environment"]["device"].removeprefix("NVIDIA ")
    lines = [
        f"| [update](docs/guides/trl.md#speed), 1B, one {device} | TRL, checkpointing (default) | TRL | CGGR |",
        "|---|---|---|---|",
    ]
    for task, what in BRIEFLY.items():
        result = found.get((task, "1b"))
        if result is None:
            continue
        rows = by_label(result)
        control, plain = rows.get(CONTROL), rows.get(PLAIN)
        label = ROUTED if ROUTED in rows else f"{ROUTED}, captured"
        routed, how = rows[label], label.removeprefix(ROUTED)
        cells = [f"{seconds(row)}, {memory(row)} GB" if row else seconds(row) for row in (control, plain, routed)]
        lines.append(f"| {what} | {cells[0]} | {cells[1]} | {cells[2]}{how}: **{times(control, routed)}** |")
    return "\n".join(lines)


def long(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The guide's table: every row of every result."""
    lines = [
        "| | model | time | faster than checkpointing | than without | tokens with a backward | peak memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for (task, model), result in found.items():
        rows = by_label(result)
        lines.append(f"| {TASKS[task]} | {MODELS[model]} | | | | | |")
        for name in [*rows, *result["settings"]["out_of_memory"]]:
            row = rows.get(name)
            if row is None:
                lines.append(f"| {name} | | {seconds(None)} | | | | |")
                continue
            faster = f"{times(rows.get(CONTROL), row)} | {times(rows.get(PLAIN), row)}"
            lines.append(f"| {name} | | {seconds(row)} | {faster} | {row['keep']:.1%} | {memory(row)} |")
    return "\n".join(lines)


def put(path: Path, name: str, text: str) -> None:
    """Write a table between its marks.

    Raises:
        SystemExit: If the file does not have them.
    """
    begin, end = (mark.format(name) for mark in _MARKS)
    before = path.read_text(encoding="utf-8")
    after, count = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}{text}\n{end}", before, flags=re.DOTALL
    )
    if not count:
        raise SystemExit(f"{path} lacks the marks {begin.strip()} and {end}")
    path.write_text(after, encoding="utf-8")


def main() -> None:
    """Write both tables."""
    found = results()
    if not found:
        raise SystemExit("no trl_trainers_*.json: run benchmarks.trl_trainers first")
    put(ROOT / "README.md", "trainers", short(found))
    put(ROOT / "docs" / "guides" / "trl.md", "trainers", long(found))
    print(short(found))


if __name__ == "__main__":
    main()
