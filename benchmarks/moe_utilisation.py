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
SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3}


def profiled_passes(shape: int, place: int) -> None:
    """One pass of each candidate for the profiler to look at, what runs before left out, a sleep before each."""
    torch.manual_seed(0)
    problem = Problem(SHAPES[shape], "cuda")
    problem.spread("balanced")
    layers = problem.candidates(compiled=False, peers=False)
    calls = [problem.calls(layers[candidate])[place] for candidate in CANDIDATES]
    for call in calls * 2:
        call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for call in calls:
        torch.cuda._sleep(1000)
        call()
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


def read_kernels(text: str) -> list[dict[str, dict[str, float]]]:
    """What ncu printed: for each candidate, kernel → metric → value, in seconds and percent."""
    passes: list[dict[str, dict[str, float]]] = []
    for line in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        if "spin_kernel" in line["Kernel Name"]:
            if line["Metric Name"] == TIME:
                passes.append({})
            continue
        value = float(line["Metric Value"].replace(",", ""))
        kernel = passes[-1].setdefault(line["ID"], {})
        kernel[line["Metric Name"]] = value * SECONDS.get(line["Metric Unit"], 1.0)
    return passes


def measure(shape: int, place: int) -> dict[str, dict[str, Any]]:
    """Kernels, their time, and the shares of one pass of each candidate."""
    metrics = ",".join((TIME, *SHARES.values()))
    ncu = ["ncu", "--csv", "--clock-control", "none", "--profile-from-start", "off", "--metrics", metrics]
    child = [sys.executable, "-m", "benchmarks.moe_utilisation", "--child", str(shape), str(place)]
    done = subprocess.run([*ncu, *child], capture_output=True, text=True, check=False)
    passes = read_kernels(done.stdout)
    if len(passes) != len(CANDIDATES):
        raise RuntimeError(f"ncu saw {len(passes)} passes: {done.stdout[-800:]}{done.stderr[-800:]}")
    rows = {}
    for candidate, kernels in zip(CANDIDATES, passes, strict=True):
        seconds = sum(kernel[TIME] for kernel in kernels.values())
        row = _record.summary([seconds]) | {"unit": "s", "kernels": len(kernels)}
        for name, metric in SHARES.items():
            row[name] = sum(kernel[metric] * kernel[TIME] for kernel in kernels.values()) / seconds / 100
        shown = f"{row['kernels']:5d} kernels {seconds * 1e3:8.2f} ms"
        print(
            f"{SHAPES[shape]} {PASSES[place]} {candidate:12s} {shown}", {n: f"{row[n]:.1%}" for n in SHARES}, flush=True
        )
        rows[f"{SHAPES[shape]}, {PASSES[place]}: {candidate}"] = row
    base = rows[f"{SHAPES[shape]}, {PASSES[place]}: {CONTROL}"]["median"]
    for row in rows.values():
        row["ratio"] = _record.summary([base / row["median"]])
    return rows


def main() -> None:
    """Profile the candidates on the chosen shapes, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=(0,))
    parser.add_argument("--passes", nargs="+", type=int, choices=(0, 1), default=(1,))
    parser.add_argument("--folder", type=Path, default=_record.RESULTS)
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        profiled_passes(*arguments.child)
        return
    rows: dict[str, dict[str, Any]] = {}
    for shape in arguments.shapes:
        for place in arguments.passes:
            rows |= measure(shape, place)
    settings = {"seed": 0, "tokens": TOKENS, "dtype": "bfloat16", "load": "balanced"}
    control = next(name for name in rows if name.endswith(f": {CONTROL}"))
    _record.write("moe_utilisation", rows, settings=settings, control=control, device="cuda", folder=arguments.folder)


if __name__ == "__main__":
    main()
