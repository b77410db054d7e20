"""Time every kernel on a GPU against its alternatives, on random data larger than the cache.

For each op: the control (an ordinary implementation), this project's kernel, and the peers that are installed. Times
are medians of CUDA events around single calls, queued behind a wait and taken in turns. ``bar`` rows hold the goals and
whether they were met. ``--compile-only`` runs every candidate of the ops once, so that compilers fill their caches
before the measurement.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks import _record
from benchmarks._kernels import SEED, Call, Table, draw, peak_bytes, time_in_turns
from benchmarks._kernels_attention import bench_attention
from cggr_core.backends import resolve


def reference(op: str) -> Callable[..., Any]:
    """The plain-torch implementation of an op, which float64 always runs."""
    return resolve(op, "cpu", torch.float64)


def statistics_in_torch(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The five statistics in plain torch without a sort, the form that ``torch.compile`` fuses best."""
    x = logits.float()
    largest = x.amax(-1, keepdim=True)
    d = x - largest
    e = d.exp()
    z = e.sum(-1)
    ties = (x == largest).sum(-1) > 1
    second = torch.where(ties, largest[:, 0], torch.where(x == largest, -math.inf, x).amax(-1))
    nll = z.log() - d.gather(-1, targets[:, None])[:, 0]
    gradnorm = ((e * e).sum(-1) / (z * z) - 2 * (-nll).exp() + 1).clamp_min(0).sqrt()
    return z.log() - (e * d).sum(-1) / z, 1 / z, (1 - (second - largest[:, 0]).exp()) / z, nll, gradnorm


@triton.jit
def _read_kernel(ptr, out_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * STEPS * BLOCK
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        total |= tl.load(ptr + base + step * BLOCK + tl.arange(0, BLOCK))
    # Never true, but the compiler cannot know that.
    if tl.max(total, 0) == -123456789:
        tl.store(out_ptr, 1)


def read_bandwidth(x: torch.Tensor) -> float:
    """Bytes per second of a kernel that only reads ``x``, the best of a few launch shapes."""
    words = x.view(torch.int32).flatten()
    out = torch.zeros(1, dtype=torch.int32, device=x.device)
    best = 0.0
    for block, warps, steps in ((2048, 4, 16), (4096, 8, 16), (4096, 8, 8), (2048, 4, 64)):
        programs = words.numel() // (steps * block)

        def call(block: int = block, warps: int = warps, steps: int = steps, programs: int = programs) -> None:
            _read_kernel[(programs,)](words, out, STEPS=steps, BLOCK=block, num_warps=warps)

        seconds = _record.summary(time_in_turns({"read": call}, 20)["read"])["median"]
        best = max(best, programs * steps * block * 4 / seconds)
    return best


def bench_difficulty(table: Table, arguments: argparse.Namespace) -> None:
    """Statistics of 16,384 rows of 128,256 logits, and of a vocabulary that leaves rows unaligned."""
    from cggr_kernels.difficulty import difficulty

    difficulty_reference = reference("difficulty")
    for N, V in ((16384, 128256), (16384, 50257)):
        logits = torch.randn(N, V, device="cuda", dtype=torch.bfloat16)
        targets = torch.randint(0, V, (N,), device="cuda")
        op = f"difficulty {N}x{V} bf16"
        candidates: dict[str, Call] = {
            "eager": partial(difficulty_reference, logits, targets, -100),
            "cggr": partial(difficulty, logits, targets),
        }
        if arguments.compiled:
            candidates["torch.compile"] = partial(torch.compile(statistics_in_torch, dynamic=False), logits, targets)
        size = logits.numel() * 2
        medians = table.measure(op, candidates, "eager", bytes_per_second=lambda _, s, size=size: size / s)
        if V == 128256:
            peak = read_bandwidth(logits)
            print(f"   read bandwidth {peak / 1e12:.3f} TB/s")
            table.bar(op, "share of read bandwidth", size / medians["cggr"] / peak, 0.9)
            table.bar(op, "times eager", medians["eager"] / medians["cggr"], 5)
            if "torch.compile" in medians:
                table.bar(op, "times torch.compile", medians["torch.compile"] / medians["cggr"], 1.2)


def head_problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, head weight and targets of the shape in the bars."""
    N, H, V = 16384, 2048, 128256
    hidden = torch.randn(N, H, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(V, H, device="cuda") * 0.02).bfloat16()
    return hidden, weight, torch.randint(0, V, (N,), device="cuda")


def bench_linear_difficulty(table: Table, arguments: argparse.Namespace) -> None:
    """Statistics from hidden states, against the matrix product alone."""
    from cggr_kernels.linear_difficulty import linear_difficulty

    linear_difficulty_reference = reference("linear_difficulty")
    hidden, weight, targets = head_problem()
    op = "linear_difficulty 16384x2048x128256 bf16"
    candidates: dict[str, Call] = {
        "matmul alone": lambda: torch.mm(hidden, weight.t()),
        "eager": lambda: linear_difficulty_reference(hidden, weight, targets, None, None, None, -100),
        "cggr": lambda: linear_difficulty(hidden, weight, targets),
    }
    flop = 2 * hidden.numel() * weight.shape[0]
    medians = table.measure(
        op,
        candidates,
        "matmul alone",
        flop_per_second=lambda _, s: flop / s,
        peak_bytes=lambda name, _: peak_bytes(candidates[name]),
    )
    table.bar(op, "times the matmul", medians["cggr"] / medians["matmul alone"], 1.25, at_most=True)


def bench_linear_cross_entropy(table: Table, arguments: argparse.Namespace) -> None:
    """Loss of a quarter of the rows and its gradients."""
    from cggr_kernels.linear_cross_entropy import linear_cross_entropy

    chunked_linear_cross_entropy = reference("linear_cross_entropy")
    hidden, weight, targets = head_problem()
    kept = torch.randperm(hidden.shape[0], device="cuda")[: hidden.shape[0] // 4].sort().values
    masked = torch.full_like(targets, -100)
    masked[kept] = targets[kept]
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def both(loss: Callable[[], torch.Tensor]) -> Call:
        return lambda: torch.autograd.grad(loss(), leaves)

    def plain(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.linear(hidden[kept], weight)
        return torch.nn.functional.cross_entropy(logits.float(), targets[kept], reduction="sum")

    candidates: dict[str, Call] = {
        "eager": both(lambda: plain(hidden, weight)),
        "cggr": both(lambda: linear_cross_entropy(hidden, weight, targets, kept)),
        "cggr, all logits at once": both(lambda: linear_cross_entropy(hidden, weight, targets, kept, max_logits=2**30)),
        "cggr, losses of rows": both(
            lambda: linear_cross_entropy(hidden, weight, targets, kept, reduction="none").sum()
        ),
        "cggr-core chunked": both(
            lambda: chunked_linear_cross_entropy(hidden, weight, targets, kept, None, None, None, None, -100, "sum")
        ),
    }
    if arguments.compiled:
        compiled = torch.compile(plain, dynamic=False)
        candidates["torch.compile"] = both(lambda: compiled(hidden, weight))
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        builtin = torch.nn.functional.linear_cross_entropy
        candidates["F.linear_cross_entropy"] = both(
            lambda: builtin(hidden[kept], weight, targets[kept], reduction="sum")
        )
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        candidates["Liger, rest -100"] = both(lambda: _first(Liger.apply(hidden, weight, masked)))
        candidates["Liger, compacted"] = both(lambda: _first(Liger.apply(hidden[kept], weight, targets[kept])))
    except ImportError as error:
        print("   no liger-kernel:", error)
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        candidates["CCE, filtered"] = both(lambda: cce(hidden, weight, masked, reduction="sum"))
        candidates["CCE, exact"] = both(lambda: cce(hidden, weight, masked, reduction="sum", filter_eps=None))
    except ImportError as error:
        print("   no cut-cross-entropy:", error)
    op = "linear_cross_entropy 16384x2048x128256 bf16, 25% kept, forward + backward"
    medians = table.measure(op, candidates, "eager", peak_bytes=lambda name, _: peak_bytes(candidates[name]))
    rows = {name: table.rows[f"{op}: {name}"] for name in medians}
    if "Liger, rest -100" in medians:
        table.bar(op, "times Liger with the rest -100", medians["Liger, rest -100"] / medians["cggr"], 3)
    for name in ("CCE, filtered", "CCE, exact"):
        if name in medians:
            table.bar(op, f"times {name}", medians[name] / medians["cggr"], 1.1)
    outputs = 2 * (hidden.numel() + weight.numel())
    limit = f"the gradients alone are {outputs} bytes; the kept rows' gradient is made before it is scattered into one"
    for name in ("Liger, rest -100", "CCE, filtered"):
        if name in medians:
            share = rows["cggr"]["peak_bytes"] / rows[name]["peak_bytes"]
            table.bar(op, f"memory over {name}", share, 1.0, at_most=True, limit=limit)


def _first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


def bench_select(table: Table, arguments: argparse.Namespace) -> None:
    """A quarter of 2^20 scores, in one row and in 64, against one ``torch.topk``."""
    from cggr_kernels.select import select

    select_reference = reference("select")
    for B, S in ((1, 2**20), (64, 2**14)):
        score = torch.rand(B, S, device="cuda")
        countable = torch.rand(B, S, device="cuda") < 0.95
        draw = torch.zeros((), dtype=torch.int64, device="cuda")
        K = S // 4

        def ours(strategy: str, score: Any = score, countable: Any = countable, K: int = K, draw: Any = draw) -> Call:
            return lambda: select(score, countable, 0.25, strategy, K, draw=draw)

        def plain(score: Any = score, countable: Any = countable, K: int = K, draw: Any = draw) -> object:
            return select_reference(score, countable, 0.25, "stratified", K, 4, 1, True, 0, draw, 0.05, 0)

        def top(score: Any = score, K: int = K) -> object:
            return torch.topk(score, K, dim=1)

        op = f"select {B}x{S}, 25% kept"
        candidates: dict[str, Call] = {"torch.topk": top, "eager, stratified": plain}
        candidates |= {f"cggr, {strategy}": ours(strategy) for strategy in ("stratified", "sampled", "topk")}
        medians = table.measure(op, candidates, "torch.topk")
        if B == 1:
            for strategy in ("stratified", "sampled", "topk"):
                share = medians[f"cggr, {strategy}"] / medians["torch.topk"]
                table.bar(op, f"{strategy}, times torch.topk", share, 3, at_most=True)


BENCHES: dict[str, Callable[[Table, argparse.Namespace], None]] = {
    "difficulty": bench_difficulty,
    "linear_difficulty": bench_linear_difficulty,
    "linear_cross_entropy": bench_linear_cross_entropy,
    "select": bench_select,
    "routed_attention": bench_attention,
}


def main() -> None:
    """Run the chosen ops, print a table, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=sorted(BENCHES), default=list(BENCHES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave out torch.compile")
    parser.add_argument("--compile-only", action="store_true", help="fill the compilers' caches, write nothing")
    parser.add_argument("--folder", type=Path, default=_record.RESULTS)
    _record.add_seconds(parser)
    arguments = parser.parse_args()
    deadline = _record.deadline(arguments.seconds)
    if not torch.cuda.is_available():
        parser.error("the kernels need a CUDA device, and PyTorch sees none here")
    torch.manual_seed(SEED)
    table = Table(1 if arguments.compile_only else arguments.repeats)
    for op in arguments.ops:
        if table.rows and _record.is_over(deadline):
            print(f"{op}: time is up", flush=True)
            continue
        BENCHES[op](table, arguments)
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.compile_only:
        return
    settings = {"seed": SEED, "keep_ratio": 0.25, "dtype": "bfloat16", "repeats": arguments.repeats}
    control = next(
        name
        for name in table.rows
        if name.endswith((": eager", ": matmul alone", ": torch.topk", ": SDPA with a mask"))
    )
    _record.write("kernels", table.rows, settings=settings, control=control, device="cuda", folder=arguments.folder)
    draw(_record.load("kernels", folder=arguments.folder), arguments.folder / "kernels.png")


if __name__ == "__main__":
    main()
