"""Figure and table of ``benchmarks.distributed`` on different numbers of GPUs, from its JSON files.

``python -m benchmarks.distributed_figures 1b`` reads ``distributed_1b_N.json``, writes ``distributed_1b.png`` and
prints the table of the documentation. Every rank has a whole batch, so a row's efficiency is its tokens per second
divided by (one GPU's times the number of GPUs).
"""

import argparse
from typing import Any

from matplotlib.figure import Figure

from benchmarks import _record

STYLES = {
    "standard, DDP": ("0.35", "o-"),
    "standard, FSDP2": ("0.35", "s--"),
    "CGGR, DDP": ("#2a6f97", "o-"),
    "CGGR, FSDP2": ("#2a6f97", "s--"),
    "CGGR random, DDP": ("#c8553d", "o-"),
    "CGGR random, FSDP2": ("#c8553d", "s--"),
}
METHODS = {"standard": "standard", "CGGR": "two passes", "CGGR random": "interleaved"}


def results(shape: str) -> dict[int, dict[str, Any]]:
    """Result by number of ranks, fewest first."""
    found = (_record.load(path.stem) for path in _record.RESULTS.glob(f"distributed_{shape}_*.json"))
    by_ranks = {result["settings"]["ranks"]: result for result in found}
    if 1 not in by_ranks:
        raise SystemExit(f"no distributed_{shape}_1.json: run benchmarks.distributed {shape} on one device first")
    return dict(sorted(by_ranks.items()))


def table(by_ranks: dict[int, dict[str, Any]]) -> str:
    """Markdown: tokens per second, speedup over the standard step of the same engine and ranks, efficiency."""
    methods = [method for method in METHODS if in_all(by_ranks, f"{method}, DDP")]
    columns = ["", "GPUs", *(f"{METHODS[method]}, tokens/s" for method in methods), "faster", "efficiency"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for engine in ("DDP", "FSDP2"):
        for ranks, result in by_ranks.items():
            speeds = [speed(result, f"{method}, {engine}") for method in methods]
            alone = [speed(by_ranks[1], f"{method}, {engine}") for method in methods]
            faster = " / ".join(f"{routed / speeds[0]:.2f}x" for routed in speeds[1:])
            shares = " / ".join(f"{one / (first * ranks):.0%}" for one, first in zip(speeds, alone, strict=True))
            numbers = " | ".join(f"{one:,.0f}" for one in speeds)
            lines.append(f"| {engine} | {ranks} | {numbers} | {faster} | {shares} |")
    return "\n".join(lines)


def in_all(by_ranks: dict[int, dict[str, Any]], row: str) -> bool:
    """Whether a row was measured on every number of ranks."""
    return all(row in result["rows"] for result in by_ranks.values())


def speed(result: dict[str, Any], row: str) -> float:
    """Median tokens per second of all ranks."""
    return result["rows"][row]["tokens_per_second"]["median"]


def draw(shape: str, by_ranks: dict[int, dict[str, Any]]) -> None:
    """A line per engine and method over the number of GPUs, with quartiles; dotted: one GPU's speed times N."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    ranks = list(by_ranks)
    for row, (colour, style) in STYLES.items():
        if not in_all(by_ranks, row):
            continue
        numbers = [result["rows"][row]["tokens_per_second"] for result in by_ranks.values()]
        medians = [number["median"] / 1e3 for number in numbers]
        spread = [
            [median - number["spread"][0] / 1e3 for median, number in zip(medians, numbers, strict=True)],
            [number["spread"][1] / 1e3 - median for median, number in zip(medians, numbers, strict=True)],
        ]
        axes.errorbar(ranks, medians, yerr=spread, fmt=style, color=colour, label=row, capsize=3)
        axes.plot(ranks, [medians[0] * count for count in ranks], ":", color=colour, linewidth=0.8)
    axes.set_xticks(ranks)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("thousand tokens per second, all GPUs")
    first = by_ranks[1]
    settings = first["settings"]
    sizes = f"{settings['batch_of_a_rank']} sequences of {settings['sequence']:,} tokens on each"
    axes.set_title(
        f"{first['environment']['device']}, {settings['layers']} layers of {settings['hidden']}, {sizes}\n"
        f"keep ratio {settings['keep_ratio']}; dotted: one GPU's speed times their number",
        fontsize=9, loc="left",
    )  # fmt: skip
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(_record.RESULTS / f"distributed_{shape}.png", dpi=150)


def main() -> None:
    """Draw, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape")
    by_ranks = results(shape := parser.parse_args().shape)
    draw(shape, by_ranks)
    print(table(by_ranks))


if __name__ == "__main__":
    main()
