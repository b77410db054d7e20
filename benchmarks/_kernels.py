"""Shared by the kernel benchmarks: timing and memory of a call, the table of rows, and their plot."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import _record

Call = Callable[[], object]
SEED = 0
QUEUE_CYCLES = 4_000_000  # about 2 ms, longer than queueing any call takes


def time_in_turns(candidates: dict[str, Call], repeats: int, warmup: int = 3) -> dict[str, list[float]]:
    """Seconds of each call by CUDA events, in turns; a candidate that fails is left out, and the reason is printed."""
    working = {}
    for name, call in candidates.items():
        try:
            for _ in range(warmup):
                call()
            torch.cuda.synchronize()
            working[name] = call
        except Exception as error:
            print(f"   {name}: cannot run here: {type(error).__name__}: {str(error).splitlines()[:1]}", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in working}
    for _ in range(repeats):
        for name, call in working.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            # The device waits while the call is queued, so that its work is timed rather than the host's.
            torch.cuda._sleep(QUEUE_CYCLES)
            start.record()
            call()
            end.record()
            end.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def peak_bytes(call: Call) -> int:
    """Peak memory of a call, above what was allocated before it."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Table:
    """Rows of the result, and the bars."""

    def __init__(self, repeats: int) -> None:
        self.repeats = repeats
        self.rows: dict[str, dict[str, Any]] = {}

    def measure(self, op: str, candidates: dict[str, Call], control: str, **extra: Any) -> dict[str, float]:
        """Time the candidates of one op and shape; ``extra`` maps row fields to functions of (name, median)."""
        print(op, flush=True)
        timed = time_in_turns(candidates, self.repeats)
        medians = {}
        for name, samples in timed.items():
            row = _record.summary(samples) | {"unit": "s"}
            row["ratio"] = _record.summary([c / s for c, s in zip(timed[control], samples, strict=True)])
            row |= {field: function(name, row["median"]) for field, function in extra.items()}
            self.rows[f"{op}: {name}"] = row
            medians[name] = row["median"]
            shown = {k: f"{v:.4g}" for k, v in row.items() if isinstance(v, float) and k != "median"}
            print(f"   {name:34s} {row['median'] * 1e3:9.3f} ms  x{row['ratio']['median']:.2f}  {shown}", flush=True)
        return medians

    def bar(self, op: str, what: str, value: float, wanted: float, at_most: bool = False, limit: str = "") -> None:
        """Record a bar: whether ``value`` reaches ``wanted`` (or stays below it), and if not, what limits it."""
        met = value <= wanted if at_most else value >= wanted
        self.rows[f"bar: {op}: {what}"] = (
            _record.summary([value])
            | {
                "unit": "1",
                "ratio": _record.summary([value / wanted]),
                "wanted": wanted,
                "at_most": at_most,
                "met": met,
            }
            | ({} if met or not limit else {"limit": limit})
        )
        print(
            f"   BAR {what}: {value:.3f} {'<=' if at_most else '>='} {wanted}: {'met' if met else 'NOT MET'}",
            flush=True,
        )


def draw(result: dict[str, Any], path: Path) -> None:
    """One panel per op and shape: time of each candidate, this project's in blue."""
    from matplotlib.figure import Figure

    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in result["rows"].items():
        if not name.startswith("bar: "):
            op, candidate = name.split(": ", 1)
            groups.setdefault(op, {})[candidate] = row
    heights = [0.6 + 0.3 * len(group) for group in groups.values()]
    figure = Figure(figsize=(8.5, sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (op, group) in zip(panels, groups.items(), strict=True):
        for place, (name, row) in enumerate(group.items()):
            milliseconds = row["median"] * 1e3
            axes.barh(place, milliseconds, color="#2a6f97" if name.split(",")[0] == "cggr" else "0.65", height=0.65)
            axes.text(milliseconds, place, f" {milliseconds:.3g}", va="center", fontsize=7)
        axes.set_yticks(range(len(group)), list(group), fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(op, fontsize=8, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("milliseconds (median)", fontsize=8)
    figure.suptitle(f"cggr-kernels on {result['environment']['device']}", fontsize=9)
    figure.savefig(path, dpi=150)
