"""How busy tensor cores and multiprocessors are in a token-routed MLP layer: Nsight Compute, kernel by kernel.

The layer's forward and forward + backward, against transformers' loop over experts and its ``grouped_mm``; one pass of
each under ``ncu``. Shares are means over the kernels, weighted by how long each ran: of a kernel's time, not of the
time between kernels, which ``benchmarks.moe`` shows as launches and host seconds.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import _record
from benchmarks.moe import CONTROL, OURS, PASSES, SHAPES, TOKENS, Problem

TIME = "gpu__time_duration.sum"
SHARES = {
    "tensor": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed",
    "multiprocessors": "sm__cycles_active.avg.pct_of_peak_sustained_elapsed",
}
CANDIDATES = ("loop", CONTROL, OURS)


def profiled_pass(shape: int, candidate: str, place: int) -> None:
    """One pass, for the profiler to look at: what runs before it is left out."""
    torch.manual_seed(0)
    problem = Problem(SHAPES[shape], "cuda")
    problem.spread("balanced")
    call = problem.calls(problem.candidates(compiled=False, peers=False)[candidate])[place]
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def measure(shape: int, candidate: str, place: int) -> dict[str, Any]:
    """Kernels, their time, and the shares of one pass."""
    metrics = ",".join((TIME, *SHARES.values()))
    ncu = ["ncu", "--csv", "--clock-control", "none", "--profile-from-start", "off", "--metrics", metrics]
    child = [sys.executable, "-m", "benchmarks.moe_utilisation", "--child", str(shape), candidate, str(place)]
    done = subprocess.run([*ncu, *child], capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if not lines:
        raise RuntimeError(f"ncu said nothing of {candidate}: {done.stdout[-500:]}{done.stderr[-500:]}")
    kernels: dict[str, dict[str, float]] = {}
    for line in csv.DictReader(lines):
        value = float(line["Metric Value"].replace(",", ""))
        scale = {"usecond": 1e-6, "us": 1e-6, "nsecond": 1e-9, "ns": 1e-9, "msecond": 1e-3, "ms": 1e-3}
        kernels.setdefault(line["ID"], {})[line["Metric Name"]] = value * scale.get(line["Metric Unit"], 1.0)
    seconds = sum(kernel[TIME] for kernel in kernels.values())
    row = _record.summary([seconds]) | {"unit": "s", "kernels": len(kernels)}
    for name, metric in SHARES.items():
        row[name] = sum(kernel[metric] * kernel[TIME] for kernel in kernels.values()) / seconds / 100
    return row


def main() -> None:
    """Profile the candidates on the chosen shapes, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=(0, 3))
    parser.add_argument("--passes", nargs="+", type=int, choices=(0, 1), default=(0, 1))
    parser.add_argument("--folder", type=Path, default=_record.RESULTS)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        shape, candidate, place = arguments.child
        profiled_pass(int(shape), candidate, int(place))
        return
    rows: dict[str, dict[str, Any]] = {}
    for shape in arguments.shapes:
        for place in arguments.passes:
            op = f"{SHAPES[shape]}, {PASSES[place]}"
            for candidate in CANDIDATES:
                if candidate == "loop" and SHAPES[shape].E > 8:
                    continue  # thousands of kernels, each run several times by the profiler
                row = rows[f"{op}: {candidate}"] = measure(shape, candidate, place)
                shown = {name: f"{row[name]:.1%}" for name in SHARES}
                print(
                    f"{op} {candidate:12s} {row['kernels']:5d} kernels {row['median'] * 1e3:8.2f} ms {shown}",
                    flush=True,
                )
    for name, row in rows.items():
        base = rows[f"{name.rpartition(': ')[0]}: {CONTROL}"]["median"]
        row["ratio"] = _record.summary([base / row["median"]])
    settings = {"seed": 0, "tokens": TOKENS, "dtype": "bfloat16", "load": "balanced"}
    control = next(name for name in rows if name.endswith(f": {CONTROL}"))
    _record.write("moe_utilisation", rows, settings=settings, control=control, device="cuda", folder=arguments.folder)


if __name__ == "__main__":
    main()
