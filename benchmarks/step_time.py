"""Time and memory of a training step: standard, compiled, and every gradient mode and engine.

``python -m benchmarks.step_time cpu`` (two cores, a few minutes), ``... 1b``, ``... 8b`` and ``... 135m`` (one CUDA
device; with ``CGGR_BACKEND=torch`` and a ``--name``, the same without kernels). A step is forward, loss and backward;
the optimizer's share is the same for all and left out. Random token ids, random weights.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _record
from benchmarks._random_model import SEED
from benchmarks._steps import (
    SHAPES,
    STEPS_IN_A_ROW,
    GraphStep,
    RecordedByItself,
    Shape,
    make_step,
    variants_of,
)


def peak_on_device(step: Callable[[], None]) -> int:
    """Peak CUDA memory of two steps, above the model and its inputs."""
    if isinstance(step, GraphStep | RecordedByItself):
        return step.peak_extra_bytes
    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    step()
    return torch.cuda.max_memory_allocated() - before


def peak_in_this_process(shape: Shape, variant: str, ratio: float) -> int:
    """Peak resident memory of three steps, above that of the process before them (Linux)."""
    model, tokens = shape.model(), shape.tokens()
    step = make_step(model, tokens, variant, ratio)
    # A small forward first, so that libraries and their buffers are loaded and not counted.
    model(input_ids=tokens[:1, :8], labels=tokens[:1, :8]).loss.backward()
    model.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = resident_bytes("VmRSS")
    for _ in range(3):
        step()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """A memory field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory on a CPU is measured on Linux")


def peak_in_fresh_process(name: str, variant: str, ratio: float) -> int:
    """:func:`peak_in_this_process` in a new process, where no other variant has used the allocator."""
    command = [sys.executable, "-m", "benchmarks.step_time", name, "--ratio", str(ratio), "--peak-of", variant]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(output.split()[-1])


def prepared(
    model: nn.Module, tokens: Tensor, variants: list[str], ratio: float, deadline: float
) -> tuple[dict[str, Callable[[], None]], dict[str, int], dict[str, str]]:
    """The steps of the variants, each run a few times.

    Returns:
        The steps, their peak CUDA memory in bytes (none on a CPU), and why variants were left out.
    """
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name in variants:
        if _record.is_over(deadline):
            left_out[name] = "time was up"
            continue
        try:
            step = make_step(model, tokens, name, ratio)
            if tokens.is_cuda:
                peaks[name] = peak_on_device(step)
            else:
                step()
        except RuntimeError as error:  # out of memory, or cannot be compiled or recorded here: continue with the others
            model.zero_grad(set_to_none=True)
            left_out[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"left out: {name}: {left_out[name]}", flush=True)
            if tokens.is_cuda:
                torch.cuda.empty_cache()
            continue
        steps[name] = step
        print(f"ready: {name}", flush=True)
    return steps, peaks, left_out


def main() -> None:
    """Run one shape and write its JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the result")
    parser.add_argument("--only", nargs="*", help="variants to run besides the standard step")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    _record.add_seconds(parser)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.peak_of:
        print(peak_in_this_process(shape, options.peak_of, options.ratio))
        return

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # which steps are recorded, and why others are not
    cuda = shape.device == "cuda"
    everything = variants_of(shape) if options.only is None else options.only
    model, tokens = shape.model(), shape.tokens()
    # Reserves time for the rounds, however long compilation takes.
    until, deadline = (_record.deadline(options.seconds and options.seconds * share) for share in (0.6, 1.0))
    names = ["standard", *everything, "scoring and selection alone"]
    steps, peaks, left_out = prepared(model, tokens, names, options.ratio, until)
    calls = STEPS_IN_A_ROW if cuda else 1
    settings = shape.settings() | {"ratio": options.ratio, "seed": SEED, "left_out": left_out}
    settings["steps_in_a_row"] = calls
    settings["backend"] = os.environ.get("CGGR_BACKEND", "auto")
    name = options.name or f"step_time_{options.shape}"
    where = {"control": "standard", "device": shape.device, "folder": options.output}

    def write(rows: dict[str, dict[str, Any]]) -> Path:
        for variant, peak in peaks.items():
            rows[variant]["peak_extra_bytes"] = peak
        return _record.write(name, rows, settings=settings, **where)

    rounds = {"rounds": options.rounds, "deadline": deadline, "calls": calls, "each": write}
    rows = _record.measure_until(steps, control="standard", device=shape.device, **rounds)
    if not cuda:
        peaks = {
            variant: peak_in_fresh_process(options.shape, variant, options.ratio)
            for variant in steps
            if not _record.is_over(deadline)
        }
    path = write(rows)
    del model, steps
    report(json.loads(path.read_text()))
    _record.plot(_record.load(name, folder=options.output), path.with_suffix(".png"), label="seconds per step")


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    control = result["rows"]["standard"]
    print(f"{'':50} {'ms':>8} {'faster':>7} {'peak GB':>8} {'share':>6}")
    for name, row in result["rows"].items():
        line = f"{name:50} {row['median'] * 1e3:8.1f} {row['ratio']['median']:6.2f}x"
        if "peak_extra_bytes" in row:
            share = row["peak_extra_bytes"] / control["peak_extra_bytes"]
            line += f" {row['peak_extra_bytes'] / 1e9:8.2f} {share:6.2f}"
        print(line)


if __name__ == "__main__":
    main()
