"""Where the time of a step goes on a CUDA device, operator by operator, with a lower bound for each.

``python -m benchmarks.step_profile 1b`` profiles the standard and the routed steps of ``step_time``. Every row has the
device time per step, the launches, the rate of its matrix products or bytes, and a floor: the time of the products at
the board's specified rate, or of the bytes, each moved once, at its specified bandwidth.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import _record, _steps
from benchmarks._work import LABEL, PEAKS, Counted, Work

STEPS = 3
DEFAULT = (
    "standard",
    _steps.FUSED,
    "interleaved, random, kv",
    "interleaved, random, kv" + _steps.LOW,
    "kv" + _steps.SUPERVISED,
    "kv" + _steps.SUPERVISED + _steps.GIVEN + _steps.LOW,
    "two passes, full-depth scores, kv",
)
# Rows below this share of a step are merged.
LEAST = 0.004
OTHERS = "everything below"
IDLE = "no kernel"
UNATTRIBUTED = "kernels of no operator"


@dataclass
class Row:
    """An operator (with the sizes of its product) in one step.

    Attributes:
        seconds: Time of its kernels.
        launches: Their number.
        works: The work of its calls, in all profiled steps.
        kernels: Their names.
    """

    seconds: float = 0.0
    launches: float = 0.0
    works: list[Work] = field(default_factory=list)
    kernels: set[str] = field(default_factory=set)

    def add(self, other: "Row") -> None:
        """Add another row."""
        self.seconds += other.seconds
        self.launches += other.launches
        self.works += other.works
        self.kernels |= other.kernels

    def result(self, peaks: dict[str, float] | None) -> dict[str, Any]:
        """Its entry in the JSON."""
        flop, moved = (sum(getattr(work, part) for work in self.works) / STEPS for part in ("flop", "bytes"))
        made: dict[str, Any] = _record.summary([self.seconds]) | {
            "unit": "s",
            "launches": self.launches,
            "flop": flop,
            "bytes": moved,
            "kernels": sorted(name[:120] for name in self.kernels),
        }
        if peaks is not None:
            made["floor"] = sum(work.floor(peaks) for work in self.works) / STEPS
        return made


def profiled(step: Callable[[], None], *, device: str, labelled: Counted | None) -> profile:
    """A profile of a few steps."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            if labelled is None:
                step()
            else:
                with labelled:
                    step()
        if device == "cuda":
            torch.cuda.synchronize()
    return profiler


def rows_of(profiler: profile, calls: list[Work], *, device: str) -> dict[str, Row]:
    """The device time of every operator; on a CPU, its own."""
    rows: dict[str, Row] = {}
    for event in profiler.events():
        if not event.name.startswith(LABEL) or event.device_type.name != "CPU":
            continue
        work = calls[int(event.name.removeprefix(LABEL))]
        own = [(work.name.partition(" ")[0], float(event.cpu_time_total))]
        found = list(_kernels(event)) if device == "cuda" else own
        if not found:
            continue
        seconds = sum(duration for _, duration in found) / 1e6 / STEPS
        rows.setdefault(work.name, Row()).add(Row(seconds, len(found) / STEPS, [work], {name for name, _ in found}))
    return rows


def _kernels(event: Any) -> Any:
    for kernel in event.kernels:
        yield kernel.name, float(kernel.duration)
    for child in event.cpu_children:
        if not child.name.startswith(LABEL):
            yield from _kernels(child)


def kernel_seconds(profiler: profile) -> float:
    """Seconds of all kernels of a step."""
    return sum(
        float(event.self_device_time_total) for event in profiler.key_averages() if event.device_type.name == "CUDA"
    ) / (1e6 * STEPS)


def idle(profiler: profile) -> float:
    """Seconds of a step in which the device was idle, from the first kernel to the last."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA" and event.self_device_time_total
    )
    pauses, end = 0.0, spans[0][0] if spans else 0.0
    for start, stop in spans:
        pauses += max(0.0, start - end)
        end = max(end, stop)
    return pauses / 1e6 / STEPS


def report(variant: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print one variant's table."""
    total, floor = (sum(row.get(part, 0.0) for row in rows.values()) for part in ("median", "floor"))
    print(f"\n{variant}: {total * 1e3:.1f} ms, floors {floor * 1e3:.1f} ms")
    for name, row in rows.items():
        rate = ""
        if row.get("flop") and row["median"]:
            rate = f"{row['flop'] / row['median'] / 1e12:7.0f} TFLOP/s"
        elif row.get("bytes") and row["median"]:
            rate = f"{row['bytes'] / row['median'] / 1e9:7.0f} GB/s"
        at_least = f"{row['floor'] * 1e3:8.2f}" if "floor" in row else " " * 8
        print(f"{row['median'] * 1e3:8.2f} ms {at_least} {row.get('launches', 0):6.0f}x {rate:16} {name[:80]}")


def draw(result: dict[str, Any], path: Path) -> None:
    """The largest rows of each variant, with their floors."""
    from matplotlib.figure import Figure

    variants = result["settings"]["variants"]
    figure = Figure(figsize=(9, 2.4 * len(variants)), layout="constrained")
    panels = figure.subplots(len(variants), 1, squeeze=False)[:, 0]
    for axes, variant in zip(panels, variants, strict=True):
        rows = {
            name.removeprefix(variant + ": "): row
            for name, row in result["rows"].items()
            if name.startswith(variant + ": ")
        }
        largest = sorted(rows, key=lambda name: -rows[name]["median"])[:12]
        axes.barh(largest, [rows[name]["median"] * 1e3 for name in largest], color="#2a6f97", height=0.7)
        axes.barh(largest, [rows[name].get("floor", 0.0) * 1e3 for name in largest], color="0.75", height=0.35)
        axes.invert_yaxis()
        axes.tick_params(labelsize=6)
        axes.set_title(f"{variant} (grey: floor)", fontsize=8, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("ms of a step")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Profile the variants one after another; write the JSON and the plot, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=_steps.SHAPES)
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT))
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--traces", type=Path, help="folder for a Chrome trace of each variant")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the result")
    _record.add_seconds(parser)
    options = parser.parse_args()
    deadline = _record.deadline(options.seconds)
    shape = _steps.SHAPES[options.shape]
    model, tokens = shape.model(), shape.tokens()
    peaks = None
    if shape.device == "cuda":
        name = torch.cuda.get_device_name()
        peaks = next((numbers for board, numbers in PEAKS.items() if board in name), None)
    written: dict[str, dict[str, Any]] = {}
    done: list[str] = []
    for variant in options.variants:
        if done and _record.is_over(deadline):
            break
        step = _steps.make_step(model, tokens, variant, options.ratio)
        for _ in range(STEPS):
            step()
        plain = profiled(step, device=shape.device, labelled=None)
        counted = Counted()
        rows = rows_of(profiled(step, device=shape.device, labelled=counted), counted.calls, device=shape.device)
        found = tabulated(rows, peaks)
        if shape.device == "cuda":
            found[UNATTRIBUTED] = _record.summary([kernel_seconds(plain) - sum(row.seconds for row in rows.values())])
            found[IDLE] = _record.summary([idle(plain)])
            found = {name: {"unit": "s", **row} for name, row in found.items()}
        report(variant, found)
        written |= {f"{variant}: {name}": row for name, row in found.items()}
        done.append(variant)
        settings = shape.settings() | {"ratio": options.ratio, "seed": _steps.SEED, "variants": done, "peaks": peaks}
        where = {"control": next(iter(written)), "device": shape.device, "folder": options.output}
        path = _record.write(f"step_profile_{options.shape}", written, settings=settings, **where)
        if options.traces is not None:
            options.traces.mkdir(parents=True, exist_ok=True)
            name = "".join(letter if letter.isalnum() else "_" for letter in variant)
            plain.export_chrome_trace(str(options.traces / f"{name}.json.gz"))
        del step, plain
    draw(_record.load(path.stem, folder=options.output), path.with_suffix(".png"))


def tabulated(rows: dict[str, Row], peaks: dict[str, float] | None) -> dict[str, dict[str, Any]]:
    """The rows by time, with small ones merged."""
    total = sum(row.seconds for row in rows.values())
    others = Row()
    made: dict[str, dict[str, Any]] = {}
    for name, row in sorted(rows.items(), key=lambda item: -item[1].seconds):
        if row.seconds < LEAST * total:
            others.add(row)
        else:
            made[name] = row.result(peaks)
    if others.works:
        made[OTHERS] = others.result(peaks)
    return made


if __name__ == "__main__":
    main()
