"""How busy tensor cores and multiprocessors are in a token-routed MLP layer: Nsight Compute, kernel by kernel.

The layer's forward and forward + backward, against transformers' loop over experts and its ``grouped_mm``; one pass of
each under ``ncu``, which flushes the caches before every kernel. Shares are means over the kernels, weighted by their
time; time between kernels is not included, and ``benchmarks.moe`` shows it as launches and host seconds. The longest
kernels are listed by name. The loop is left out if it has thousands of kernels.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _record
from benchmarks._kernels import SEED, Table
from benchmarks._moe import CONTROL, LOOP, OURS, PASSES, SHAPES, TOKENS, Problem, Shape
from benchmarks.kernels_counters import TIME, read_kernels

Kernel = tuple[str, dict[str, float]]  # name and metrics, in seconds and percent
SHARES = {
    "tensor cores": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "multiprocessors": "sm__cycles_active.avg.pct_of_peak_sustained_elapsed",
}
MOST_NAMES = 16


def candidates(shape: Shape) -> tuple[str, ...]:
    """The candidates to profile on a shape."""
    return (LOOP, CONTROL, OURS) if shape.E <= 8 else (CONTROL, OURS)


def profiled_passes(shape: int, place: int) -> None:
    """One profiled pass of each candidate, after a warm-up, with a sleep before each."""
    torch.manual_seed(SEED)
    problem = Problem(SHAPES[shape], "cuda")
    problem.spread("balanced")
    layers = problem.candidates(candidates(SHAPES[shape]))
    calls = [problem.calls(layers[candidate])[place] for candidate in candidates(SHAPES[shape])]
    for call in calls * 2:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in calls:
        torch.cuda._sleep(1000)
        call()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def split_passes(kernels: Sequence[Kernel]) -> list[list[Kernel]]:
    """The kernels of each candidate: those after each sleep."""
    passes: list[list[Kernel]] = []
    for name, metrics in kernels:
        if "spin_kernel" in name:
            passes.append([])
        else:
            short = re.split(r"[<(]", name.removeprefix("void ").replace("<unnamed>::", ""))[0]
            passes[-1].append((short, metrics))
    return passes


def summarise(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """Number of kernels, their time, and the shares, weighted by time."""
    seconds = sum(metrics[TIME] for _, metrics in kernels)
    shares = {
        name: sum(metrics[metric] * metrics[TIME] for _, metrics in kernels) / seconds / 100
        for name, metric in SHARES.items()
    }
    return {"kernels": len(kernels), "seconds": seconds} | shares


def by_name(kernels: Sequence[Kernel]) -> dict[str, dict[str, Any]]:
    """The same for the kernels of each name, longest first."""
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        found.setdefault(kernel[0], []).append(kernel)
    rows = {name: summarise(group) for name, group in found.items()}
    return dict(sorted(rows.items(), key=lambda item: -item[1]["seconds"])[:MOST_NAMES])


def measure(table: Table, shape: int, place: int) -> None:
    """Kernels, their time, and the shares of one pass of each candidate; and the bar."""
    metrics = ",".join((TIME, *SHARES.values()))
    ncu = ["ncu", "--csv", "--clock-control", "none", "--profile-from-start", "off", "--metrics", metrics]
    child = [sys.executable, "-m", "benchmarks.moe_utilisation", "--child", str(shape), str(place)]
    done = subprocess.run([*ncu, *child], capture_output=True, text=True, check=False)
    passes, names = split_passes(read_kernels(done.stdout)), candidates(SHAPES[shape])
    if len(passes) != len(names):
        raise RuntimeError(f"ncu saw {len(passes)} passes: {done.stdout[-800:]}{done.stderr[-800:]}")
    op = f"{SHAPES[shape]}, {PASSES[place]}"
    rows = {name: summarise(kernels) for name, kernels in zip(names, passes, strict=True)}
    for name, kernels in zip(names, passes, strict=True):
        row = rows[name]
        seconds = row.pop("seconds")
        row |= _record.summary([seconds]) | {"unit": "s", "by_name": by_name(kernels)}
        shown = {share: f"{row[share]:.1%}" for share in SHARES}
        print(f"{op} {name:12s} {row['kernels']:5d} kernels {seconds * 1e3:8.2f} ms {shown}", flush=True)
        for kernel, numbers in row["by_name"].items():
            shown = {share: f"{numbers[share]:.1%}" for share in SHARES}
            spent = f"{numbers['kernels']:4d} launches {numbers['seconds'] * 1e6:9.1f} us"
            print(f"   {kernel[-60:]:60s} {spent} {shown}", flush=True)
    for name, row in rows.items():
        row["ratio"] = _record.summary([rows[CONTROL]["median"] / row["median"]])
        table.rows[f"{op}: {name}"] = row
    share = next(iter(SHARES))
    table.bar(op, f"share of the {share}, times {CONTROL}'s", rows[OURS][share] / rows[CONTROL][share], 1.0)


def main() -> None:
    """Profile the candidates on the chosen shapes, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=(0,))
    parser.add_argument("--passes", nargs="+", type=int, choices=(0, 1), default=(1,))
    parser.add_argument("--folder", type=Path, default=_record.RESULTS)
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    _record.add_seconds(parser)
    arguments = parser.parse_args()
    deadline = _record.deadline(arguments.seconds)
    if arguments.child:
        profiled_passes(*arguments.child)
        return
    settings = {"seed": SEED, "tokens": TOKENS, "dtype": "bfloat16", "load": "balanced"}
    table = Table(repeats=1)
    for shape in arguments.shapes:
        for place in arguments.passes:
            if table.rows and _record.is_over(deadline):
                break
            measure(table, shape, place)
            control = next(name for name in table.rows if name.endswith(f": {CONTROL}"))
            where = {"device": "cuda", "folder": arguments.folder}
            _record.write("moe_utilisation", table.rows, settings=settings, control=control, **where)


if __name__ == "__main__":
    main()
