"""Time a token-routed MLP layer on a GPU against its alternatives: all in one run, on random data.

For each shape and each distribution of the load: two dense products of the same size (the ceiling), transformers' block
with its loop over experts and with ``grouped_mm``, eager (the control) and compiled, Liger's fused experts behind the
same router, and this project's layer. All share one set of parameters. Times are medians of CUDA events, queued behind
a wait and taken in turns; launches are counted by the profiler; ``bar`` rows hold the goals and whether they were met.
Every shape has its own result file, so that shapes can be measured on several GPUs in parallel.

Liger's kernels are tuned over 240 configurations per shape. ``--compile-only`` fills the compilers' caches beforehand,
with ``--share`` in several processes; all processes need the same ``TRITON_CACHE_DIR``.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import _record
from benchmarks._kernels import SEED, Call, Table, peak_bytes
from benchmarks._moe import (
    CANDIDATES,
    COMPILED,
    CONTROL,
    DISTRIBUTIONS,
    KEPT,
    LIGER,
    LOOP,
    OURS,
    PASSES,
    SHAPES,
    TOKENS,
    Problem,
    Shape,
)

DENSE = "dense"
PEERS = {CONTROL: (1.15, 1.2), COMPILED: (1.1, 1.1), LIGER: (1.2, 1.2)}
DENSE_SHARES = (0.7, 0.6)
COLOURS = {CONTROL: "0.55", COMPILED: "0.75", LIGER: "#c9a227", LOOP: "0.88", OURS: "#2a6f97"}


def count_launches(call: Call) -> int:
    """Number of kernels, copies and fills that a call launches on the device."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.profiler.DeviceType.CUDA for event in profiler.events())


def host_seconds(call: Call, repeats: int = 5) -> float:
    """Seconds that the host spends in a call, including any wait for the device."""
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return _record.summary(samples)["median"]


def compare(table: Table, problem: Problem, distribution: str, layers: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Time one shape with one distribution of the load, and evaluate its bars."""
    problem.spread(distribution)
    # With many experts the loop takes a fifth of a second, spent on launches whatever the load.
    timed = {n: layer for n, layer in layers.items() if n != LOOP or problem.shape.E <= 8 or distribution == "balanced"}
    calls = {name: problem.calls(layer) for name, layer in timed.items()} | {DENSE: problem.dense_calls()}
    for place, what in enumerate(PASSES):
        op = f"{problem.shape}, {distribution}, {what}"
        flop = problem.flop(backward=place == 1)
        candidates = {name: pair[place] for name, pair in calls.items()}
        medians = table.measure(op, candidates, CONTROL, flop_per_second=lambda _, seconds, flop=flop: flop / seconds)
        if OURS not in medians:
            continue
        for peer, wanted in PEERS.items():
            if peer in medians:
                table.bar(op, f"times {peer}", medians[peer] / medians[OURS], wanted[place])
        if problem.shape.I == 4096:
            table.bar(op, "share of the dense rate", medians[DENSE] / medians[OURS], DENSE_SHARES[place])


def compare_masked(table: Table, problem: Problem) -> None:
    """Time this project's layer with a quarter of the tokens routed, against all of them."""
    problem.spread("balanced")
    all_tokens, some_tokens = problem.calls(lambda x: problem.layer(x)[0]), problem.calls(problem.masked())
    for place, what in enumerate(PASSES):
        candidates = {"all tokens": all_tokens[place], f"{KEPT:.0%} of the tokens": some_tokens[place]}
        table.measure(f"{problem.shape}, token mask, {what}", candidates, "all tokens")


def describe(table: Table, problem: Problem, layers: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """Peak memory, launches and the host's time of each candidate, at a balanced load."""
    problem.spread("balanced")
    peaks, counts = {}, {}
    for name, layer in layers.items():
        for what, call in zip(PASSES, problem.calls(layer), strict=True):
            gc.collect()
            torch.cuda.empty_cache()
            call()
            peak, launches, host = peak_bytes(call), count_launches(call), host_seconds(call)
            peaks[what, name], counts[what, name] = peak, launches
            row = _record.summary([peak]) | {"unit": "B", "ratio": _record.summary([peaks[what, CONTROL] / peak])}
            table.rows[f"{problem.shape}, {what}, memory: {name}"] = row | {"launches": launches, "host_seconds": host}
            print(f"   {what:20s} {name:24s} {peak / 2**20:8.0f} MiB {launches:6d} launches, host {host * 1e3:.2f} ms")
    for what in PASSES:
        for bar, found in (("peak memory", peaks), ("launches", counts)):
            share = found[what, OURS] / found[what, CONTROL]
            table.bar(f"{problem.shape}, {what}", f"{bar}, times grouped_mm's", share, 1.0, at_most=True)


def result_name(shape: Shape, first: str) -> str:
    """Name of a shape's result file: ``moe_h1024_i4096_e8_k2``."""
    return "_".join((first, *str(shape).lower().split()))


def draw(folder: Path, first: str) -> None:
    """For each shape and pass, the rate of every candidate by distribution of the load; dense as a line."""
    from matplotlib.figure import Figure

    found = [shape for shape in SHAPES if (folder / f"{result_name(shape, first)}.json").exists()]
    results = {str(shape): _record.load(result_name(shape, first), folder=folder) for shape in found}
    measured = [name for result in results.values() for name in result["rows"]]
    loads = [one for one in DISTRIBUTIONS if any(f", {one}, " in name for name in measured)]
    colours = {name: colour for name, colour in COLOURS.items() if any(row.endswith(f": {name}") for row in measured)}
    figure = Figure(figsize=(10, 2.1 * len(results) + 0.7), layout="constrained")
    panels = figure.subplots(len(results), len(PASSES), squeeze=False, sharey="row")
    for (shape, result), line in zip(results.items(), panels, strict=True):
        for what, axes in zip(PASSES, line, strict=True):
            rates = {
                op: row["flop_per_second"] / 1e12 for op, row in result["rows"].items() if "flop_per_second" in row
            }
            for place, distribution in enumerate(loads):
                op = f"{shape}, {distribution}, {what}"
                for offset, (name, colour) in enumerate(colours.items()):
                    at = place + (offset - (len(colours) - 1) / 2) * 0.17
                    axes.bar(at, rates.get(f"{op}: {name}", 0.0), 0.16, color=colour, label=None if place else name)
                if height := rates.get(f"{op}: {DENSE}"):
                    axes.plot([place - 0.45, place + 0.45], [height] * 2, color="#b23a48", lw=1.2)
            axes.set_xticks(range(len(loads)), loads, fontsize=7)
            axes.tick_params(axis="y", labelsize=7)
            axes.set_title(f"{shape}, {what}", fontsize=8, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("TFLOP/s", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    device = next(iter(results.values()))["environment"]["device"]
    figure.suptitle(f"Token-routed MLP on {device}, {TOKENS} tokens, bfloat16; line: dense products", fontsize=9)
    figure.savefig(folder / f"{first}.png", dpi=150)


def measure(shape: Shape, arguments: argparse.Namespace) -> None:
    """Measure one shape; results are written immediately."""
    table = Table(arguments.repeats)
    problem = Problem(shape, "cuda", arguments.tokens)
    layers = problem.candidates((CONTROL, *arguments.candidates))
    settings = {"seed": SEED, "tokens": arguments.tokens, "dtype": "bfloat16", "repeats": arguments.repeats}
    control = f"{shape}, {arguments.distributions[0]}, {PASSES[0]}: {CONTROL}"
    where = {"control": control, "device": "cuda", "folder": arguments.folder}
    for distribution in arguments.distributions:
        if table.rows and _record.is_over(arguments.deadline):
            break
        compare(table, problem, distribution, layers)
        _record.write(result_name(shape, arguments.name), table.rows, settings=settings, **where)
    if OURS in layers and not _record.is_over(arguments.deadline):
        compare_masked(table, problem)
        describe(table, problem, layers)
    _record.write(result_name(shape, arguments.name), table.rows, settings=settings, **where)
    draw(arguments.folder, arguments.name)


def compile_only(shape: Shape, arguments: argparse.Namespace) -> None:
    """Run every candidate once, to fill the compilers' caches."""
    problem = Problem(shape, "cuda", arguments.tokens)
    problem.spread(DISTRIBUTIONS[0])
    layers = problem.candidates(arguments.candidates)
    if OURS in layers:
        layers["token mask"] = problem.masked()
    for name, layer in layers.items():
        start = time.perf_counter()
        for call in problem.calls(layer):
            call()
        torch.cuda.synchronize()
        print(f"{shape} {name}: {time.perf_counter() - start:.1f} s", flush=True)


def keep_share(place: int, count: int) -> None:
    """Keep every ``count``-th of the configurations of Liger's kernels, starting at ``place``."""
    from liger_kernel.ops import fused_moe_kernels
    from triton.runtime.autotuner import Autotuner

    for kernel in vars(fused_moe_kernels).values():
        if isinstance(kernel, Autotuner):
            kernel.configs = kernel.configs[place::count]


def main() -> None:
    """Run the chosen shapes, print a table, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=range(len(SHAPES)))
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=DISTRIBUTIONS)
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=CANDIDATES)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--compile-only", action="store_true", help="fill the compilers' caches, write nothing")
    parser.add_argument(
        "--share",
        nargs=2,
        type=int,
        metavar=("PLACE", "COUNT"),
        help="with --compile-only: every COUNT-th of Liger's configurations, from PLACE (0 to COUNT - 1) on",
    )
    parser.add_argument("--name", default="moe", help="first part of the result files' names")
    parser.add_argument("--folder", type=Path, default=_record.RESULTS)
    _record.add_seconds(parser)
    arguments = parser.parse_args()
    arguments.deadline = _record.deadline(arguments.seconds)
    if not torch.cuda.is_available():
        parser.error("the kernels need a CUDA device, and PyTorch sees none here")
    if arguments.share and not arguments.compile_only:
        parser.error("--share skips configurations that a measurement has to try; use it with --compile-only")
    if arguments.share:
        keep_share(*arguments.share)
    for place in arguments.shapes:
        if _record.is_over(arguments.deadline):
            print(f"{SHAPES[place]}: time is up", flush=True)
            continue
        torch.manual_seed(SEED)
        (compile_only if arguments.compile_only else measure)(SHAPES[place], arguments)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
