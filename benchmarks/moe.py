"""Time a token-routed MLP layer on a GPU beside what one would use without it: all peers in one run, on random data.

For each shape and each distribution of the load: two dense products of the same size (the ceiling), transformers' block
with its loop over experts and with ``grouped_mm``, eager (the control) and compiled, Liger's fused experts behind the
same router, and this project's layer. All share one set of parameters. Times are medians of CUDA events, queued behind
a wait and taken in turns; launches are counted by the profiler; ``bar`` rows hold what is to be reached and whether it
was. ``--compile-only`` runs everything once, so that compilers fill their caches before the measurement: Liger's
kernels are tuned over some hundred configurations, which takes minutes per shape and is kept between runs with
``TRITON_CACHE_AUTOTUNING=1``.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import _record
from benchmarks.kernels import SEED, Call, Table, peak_bytes

TOKENS = 16384
CONTROL = "grouped_mm"
OURS = "cggr"
DENSE = "dense"
PEERS = {CONTROL: (1.15, 1.2), "grouped_mm, compiled": (1.1, 1.1), "Liger": (1.2, 1.2)}
DENSE_SHARES = (0.7, 0.6)
PASSES = ("forward", "forward + backward")
KEPT = 0.25  # share of the tokens that the token mask lets through


class Shape(NamedTuple):
    """Sizes of a layer."""

    H: int
    I: int
    E: int
    K: int

    def __str__(self) -> str:
        return f"H{self.H} I{self.I} E{self.E} K{self.K}"


SHAPES = (Shape(1024, 4096, 8, 2), Shape(2048, 4096, 8, 2), Shape(2048, 768, 128, 8), Shape(2048, 1024, 64, 8))
DISTRIBUTIONS = ("balanced", "Zipf", "half empty", "one expert")


def logit_offsets(distribution: str, E: int) -> Tensor:
    """What is added to the router's standard normal logits, for each expert.

    ``one expert``: every token's first choice is expert 0; its other choices, which have to be others, are random.
    """
    offset = torch.zeros(E)
    if distribution == "Zipf":
        offset = -1.2 * torch.arange(1, E + 1).log()
    elif distribution == "half empty":
        offset[E // 2 :] = -30.0
    elif distribution == "one expert":
        offset[0] = 30.0
    return offset


class Problem:
    """One block of transformers and the layers that share its parameters."""

    def __init__(self, shape: Shape, device: str, tokens: int = TOKENS) -> None:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        from cggr_moe import PersistentTRMLP

        self.shape = shape
        config = Qwen3MoeConfig(
            hidden_size=shape.H,
            moe_intermediate_size=shape.I,
            num_experts=shape.E,
            num_experts_per_tok=shape.K,
            norm_topk_prob=True,
            experts_implementation="grouped_mm",
        )
        with torch.device(device):
            self.block = Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16)
            for weight in self.block.parameters():
                torch.nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[-1]))
            x = torch.randn(1, tokens, shape.H, dtype=torch.bfloat16)
            # A constant input whose column of the router's weight shifts the logits alike for all candidates.
            x[..., 0] = 1
            self.x = x.requires_grad_()
            self.upstream = torch.randn_like(x)
        self.layer = PersistentTRMLP.from_hf(self.block)
        self.leaves = [self.x, *self.block.parameters()]

    def spread(self, distribution: str) -> None:
        """Give the router the offsets of a distribution of the load."""
        with torch.no_grad():
            self.block.gate.weight[:, 0] = logit_offsets(distribution, self.shape.E)

    def with_experts(self, implementation: str, compiled: bool = False) -> Callable[[Tensor], Tensor]:
        """The block, computing its experts with one of transformers' implementations, compiled or not."""
        block = torch.compile(self.block, dynamic=False) if compiled else self.block

        def call(x: Tensor) -> Tensor:
            self.block.experts.config._experts_implementation = implementation
            return block(x)

        return call

    def with_liger(self) -> Callable[[Tensor], Tensor]:
        """The block's router before Liger's fused experts."""
        from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

        experts = self.block.experts

        def call(x: Tensor) -> Tensor:
            rows = x.view(-1, x.shape[-1])
            _, weight, index = self.block.gate(rows)
            projections = (experts.gate_up_proj, experts.down_proj)
            return LigerFusedMoEFunction.apply(rows, *projections, index.int(), weight).view(x.shape)

        return call

    def candidates(self, compiled: bool, peers: bool) -> dict[str, Callable[[Tensor], Tensor]]:
        """Name → layer, the control first."""
        found: dict[str, Callable[[Tensor], Tensor]] = {CONTROL: self.with_experts("grouped_mm")}
        if compiled:
            found["grouped_mm, compiled"] = self.with_experts("grouped_mm", compiled=True)
        if peers:
            try:
                found["Liger"] = self.with_liger()
            except ImportError as error:
                print(f"   Liger: cannot run here: {error}", flush=True)
        found["loop"] = self.with_experts("eager")
        found[OURS] = lambda x: self.layer(x)[0]
        return found

    def masked(self) -> Callable[[Tensor], Tensor]:
        """This project's layer with a token mask."""
        mask = torch.rand(self.x.shape[:2], device=self.x.device) < KEPT
        return lambda x: self.layer(x, mask)[0]

    def calls(self, layer: Callable[[Tensor], Tensor]) -> tuple[Call, Call]:
        """The layer's forward alone, and with its backward for the input and all parameters."""
        frozen = self.x.detach()

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(frozen)

        return forward, lambda: torch.autograd.grad(layer(self.x), self.leaves, self.upstream)

    def dense_calls(self) -> tuple[Call, Call]:
        """The products of as many rows with one expert each: two forward, and four more backward."""
        rows = self.x.shape[1] * self.shape.K
        a_RH, h_RI, z_RJ = (
            torch.randn(rows, size, dtype=torch.bfloat16, device=self.x.device)
            for size in (self.shape.H, self.shape.I, 2 * self.shape.I)
        )
        up, down = self.layer.gate_up_proj.detach()[0], self.layer.down_proj.detach()[0]

        def forward() -> None:
            a_RH @ up.t()
            h_RI @ down.t()

        def both() -> None:
            forward()
            a_RH @ down
            a_RH.t() @ h_RI
            z_RJ @ up
            z_RJ.t() @ a_RH

        return forward, both

    def flop(self, backward: bool) -> int:
        """Floating-point operations of the experts' products."""
        forward = self.x.shape[1] * self.shape.K * 6 * self.shape.H * self.shape.I
        return 3 * forward if backward else forward


def count_launches(call: Call) -> int:
    """Kernels, copies and fills that a call puts on the device."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.profiler.DeviceType.CUDA for event in profiler.events())


def host_seconds(call: Call, repeats: int = 5) -> float:
    """Seconds that the host is busy with a call (and waits in it, where the call waits for the device)."""
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
    # With many experts the loop takes a fifth of a second; its time is that of its launches, whatever the load.
    timed = {
        n: layer for n, layer in layers.items() if n != "loop" or problem.shape.E <= 8 or distribution == "balanced"
    }
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
    """Time this project's layer with a quarter of the tokens routed, beside all of them."""
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


def draw(result: dict[str, Any], path: Path) -> None:
    """For each shape and pass, the rate of every candidate by distribution of the load; dense as a line."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    shapes = [name for name in map(str, SHAPES) if f"{name}, {DISTRIBUTIONS[0]}, {PASSES[0]}: {OURS}" in rows]
    colours = {CONTROL: "0.55", "grouped_mm, compiled": "0.75", "Liger": "#c9a227", "loop": "0.88", OURS: "#2a6f97"}
    names = [name for name in colours if f"{shapes[0]}, {DISTRIBUTIONS[0]}, {PASSES[0]}: {name}" in rows]
    distributions = [name for name in DISTRIBUTIONS if f"{shapes[0]}, {name}, {PASSES[0]}: {OURS}" in rows]
    figure = Figure(figsize=(10, 2.1 * len(shapes) + 0.7), layout="constrained")
    panels = figure.subplots(len(shapes), len(PASSES), squeeze=False, sharey="row")
    for shape, line in zip(shapes, panels, strict=True):
        for what, axes in zip(PASSES, line, strict=True):
            for place, distribution in enumerate(distributions):
                op = f"{shape}, {distribution}, {what}"
                for offset, name in enumerate(names):
                    if row := rows.get(f"{op}: {name}"):
                        height = row["flop_per_second"] / 1e12
                        at = place + (offset - (len(names) - 1) / 2) * 0.17
                        axes.bar(at, height, 0.16, color=colours[name], label=name if place == 0 else None)
                if row := rows.get(f"{op}: {DENSE}"):
                    height = row["flop_per_second"] / 1e12
                    axes.plot([place - 0.45, place + 0.45], [height] * 2, color="#b23a48", lw=1.2)
            axes.set_xticks(range(len(distributions)), distributions, fontsize=7)
            axes.tick_params(axis="y", labelsize=7)
            axes.set_title(f"{shape}, {what}", fontsize=8, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel("TFLOP/s", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    device = result["environment"]["device"]
    figure.suptitle(f"Token-routed MLP on {device}, {TOKENS} tokens, bfloat16; line: dense products", fontsize=9)
    figure.savefig(path, dpi=150)


def run(arguments: argparse.Namespace, table: Table, shapes: Sequence[Shape]) -> None:
    """Measure the shapes one after the other; what is measured is written at once."""
    for shape in shapes:
        problem = Problem(shape, "cuda", arguments.tokens)
        layers = problem.candidates(arguments.compiled, arguments.peers)
        for distribution in arguments.distributions:
            compare(table, problem, distribution, layers)
            if not arguments.compile_only:
                write(arguments, table)
        compare_masked(table, problem)
        if not arguments.compile_only:
            describe(table, problem, layers)
            write(arguments, table)
        del problem, layers
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def write(arguments: argparse.Namespace, table: Table) -> None:
    """The rows so far, as JSON and picture."""
    settings = {"seed": SEED, "tokens": arguments.tokens, "dtype": "bfloat16", "repeats": arguments.repeats}
    control = next(name for name in table.rows if name.endswith(f": {CONTROL}"))
    _record.write("moe", table.rows, settings=settings, control=control, device="cuda", folder=arguments.folder)
    draw(_record.load("moe", folder=arguments.folder), arguments.folder / "moe.png")


def main() -> None:
    """Run the chosen shapes, print a table, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=int, choices=range(len(SHAPES)), default=range(len(SHAPES)))
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=DISTRIBUTIONS)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave out torch.compile")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="leave out other packages")
    parser.add_argument("--compile-only", action="store_true", help="fill the compilers' caches, write nothing")
    parser.add_argument("--folder", type=Path, default=_record.RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("the kernels run on a CUDA device, and PyTorch sees none here")
    torch.manual_seed(SEED)
    table = Table(1 if arguments.compile_only else arguments.repeats)
    run(arguments, table, [SHAPES[place] for place in arguments.shapes])


if __name__ == "__main__":
    main()
