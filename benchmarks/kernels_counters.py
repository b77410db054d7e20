"""What limits the kernels of routed attention: Nsight Compute's counters, kernel by kernel, on the shapes of the bars.

Each kernel of one forward + backward runs under ``ncu``: seconds, and shares of the peak of the tensor cores, of the
second-level cache, of shared memory and of device memory; and reloads of spilled registers.
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

SEED = 0
SHAPES = ((8, 2048, 128), (2, 8192, 128), (8, 2048, 64), (2, 8192, 64))
TIME = "gpu__time_duration.sum"
COUNTERS = {
    "tensor_share": "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
    "l2_share": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "shared_memory_share": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "memory_share": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "registers": "launch__registers_per_thread",
    "spill_loads": "smsp__inst_executed_op_local_ld.sum",
}
SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3}


def run_once() -> None:
    """One forward + backward of every shape, for the profiler."""
    from cggr_kernels.routed_attention import routed_attention

    for B, S, D in SHAPES:
        torch.manual_seed(SEED)
        q, k, v = (
            torch.randn(B, n, h, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for n, h in ((S // 4, 32), (S, 8), (S, 8))
        )
        position = torch.rand(B, S, device="cuda").argsort(1)[:, : S // 4].sort(1).values
        out = routed_attention(q, k, v, position)
        out.backward(torch.randn_like(out))
    torch.cuda.synchronize()


def read_kernels(text: str) -> list[tuple[str, dict[str, float]]]:
    """Name and metrics of each kernel in ncu's output, in order; times in seconds."""
    kernels: dict[str, tuple[str, dict[str, float]]] = {}
    for line in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        _, metrics = kernels.setdefault(line["ID"], (line["Kernel Name"].split("(")[0], {}))
        value = float(line["Metric Value"].replace(",", ""))
        metrics[line["Metric Name"]] = value * SECONDS.get(line["Metric Unit"], 1.0)
    return list(kernels.values())


def rows_of(kernels: list[tuple[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Rows of the result: three kernels per shape."""
    rows = {}
    for place, (name, metrics) in enumerate(kernels):
        B, S, D = SHAPES[place // 3]
        row = _record.summary([metrics[TIME]]) | {"unit": "s"}
        row |= {field: metrics[metric] for field, metric in COUNTERS.items()}
        rows[f"B{B} S{S} heads of {D}: {name}"] = row
        shown = ", ".join(f"{field} {row[field]:.4g}" for field in COUNTERS)
        print(f"B{B} S{S} D{D} {name:44s} {row['median'] * 1e3:.3f} ms  {shown}", flush=True)
    return rows


def main() -> None:
    """Run ncu on this module, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="only run the kernels, as the profiled process does")
    parser.add_argument("--folder", type=Path, default=_record.RESULTS)
    _record.add_seconds(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("the kernels need a CUDA device, and PyTorch sees none here")
    if arguments.once:
        run_once()
        return
    command = ["ncu", "--csv", "--clock-control", "none", "--kernel-name", "regex:routed_attention"]
    command += ["--metrics", ",".join([TIME, *COUNTERS.values()])]
    command += [sys.executable, "-m", "benchmarks.kernels_counters", "--once"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=arguments.seconds)
    except subprocess.TimeoutExpired as error:
        raise SystemExit(f"ncu had not ended after {arguments.seconds:g} s, and tells nothing before that") from error
    if done.returncode:
        raise RuntimeError(f"ncu ended with {done.returncode}: {done.stdout[-2000:]} {done.stderr[-2000:]}")
    rows = rows_of(read_kernels(done.stdout))
    if len(rows) != 3 * len(SHAPES):
        raise RuntimeError(f"ncu saw {len(rows)} kernels, not {3 * len(SHAPES)}: {done.stdout[-2000:]}")
    settings = {
        "seed": SEED,
        "keep_ratio": 0.25,
        "dtype": "bfloat16",
        "heads": 32,
        "key_heads": 8,
        "counters": COUNTERS,
    }
    _record.write(
        "kernels_counters", rows, settings=settings, control=next(iter(rows)), device="cuda", folder=arguments.folder
    )


if __name__ == "__main__":
    main()
