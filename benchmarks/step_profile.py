"""Where the time of a step goes on a CUDA device: kernels by kind and by total time, for variants of ``step_time``.

``python -m benchmarks.step_profile 1b "two passes, full-depth scores, kv" "interleaved, truncated router, kv"``
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import step_time

STEPS = 3
# Kind of a kernel -> parts of its name; the first that fits.
KINDS = {
    "attention": ("sdpa", "flash", "fmha", "routed_attention"),
    "scores, selection and loss": ("difficulty", "chunk_", "select", "sort"),
    "matrix products": ("nvjet", "gemm", "cublas", "cutlass", "splitk"),
    "norms": ("rms", "layer_norm", "layernorm", "gammabeta"),
    "copies and fills": ("memcpy", "memset", "copy", "fill", "gather", "scatter", "index", "catarray"),
}
OTHERS = "element by element"


def kind(name: str) -> str:
    """What a kernel is for, by its name."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in lower for part in parts)), OTHERS)


def report_kinds(events: list[Any], idle_ms: float) -> None:
    """Print milliseconds and launches of a step by kind of kernel, and the time in which none ran."""
    totals = {name: [0.0, 0.0] for name in [*KINDS, OTHERS]}
    for event in events:
        total = totals[kind(event.key)]
        total[0] += event.self_device_time_total / 1e3 / STEPS
        total[1] += event.count / STEPS
    for name, (milliseconds, launches) in sorted(totals.items(), key=lambda item: -item[1][0]):
        print(f"{milliseconds:8.2f} ms {launches:6.0f}x  {name}")
    print(f"{idle_ms:8.2f} ms          no kernel")


def idle(profiler: profile) -> float:
    """Milliseconds of a step in which the device ran nothing, from the first kernel to the last."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type.name == "CUDA" and event.self_device_time_total
    )
    pauses, end = 0.0, spans[0][0]
    for start, stop in spans:
        pauses += max(0.0, start - end)
        end = max(end, stop)
    return pauses / 1e3 / STEPS


def main() -> None:
    """Profile three steps of each variant and print where their time went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=step_time.SHAPES)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--shapes", action="store_true", help="operators and the shapes of their inputs")
    parser.add_argument("--traces", type=Path, help="folder for a Chrome trace of each variant")
    options = parser.parse_args()
    shape = step_time.SHAPES[options.shape]
    model, tokens = shape.model(), shape.tokens()
    for variant in options.variants:
        step = step_time.make_step(model, tokens, variant, options.ratio)
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
        activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
        with profile(activities=activities, record_shapes=options.shapes) as profiler:
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
        every = profiler.key_averages(group_by_input_shape=options.shapes)
        timed = [event for event in every if event.self_device_time_total]
        kernels = [event for event in timed if event.device_type.name == "CUDA"]
        total = sum(event.self_device_time_total for event in kernels)
        print(f"{variant}: {total / 1e3 / STEPS:.1f} ms of kernels in a step")
        report_kinds(kernels, idle(profiler))
        # Kernels, or the operators that launched them (with the shapes of their inputs).
        rows = [event for event in timed if event.device_type.name == "CPU"] if options.shapes else kernels
        for event in sorted(rows, key=lambda event: -event.self_device_time_total)[: options.rows]:
            shapes = [shape for shape in event.input_shapes if shape] if options.shapes else ""
            milliseconds, launches = event.self_device_time_total / 1e3 / STEPS, event.count / STEPS
            print(f"{milliseconds:8.2f} ms {launches:6.0f}x  {event.key[:60]} {shapes}")
        if options.traces is not None:
            options.traces.mkdir(parents=True, exist_ok=True)
            name = "".join(letter if letter.isalnum() else "_" for letter in variant)
            profiler.export_chrome_trace(str(options.traces / f"{name}.json.gz"))


if __name__ == "__main__":
    main()
