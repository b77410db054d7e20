"""Where the time of a step goes on a CUDA device: kernels by total time, for one variant of ``step_time``.

``python -m benchmarks.step_profile 1b "interleaved, truncated router, kv"``
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import step_time


def main() -> None:
    """Profile three steps and print the longest kernels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=step_time.SHAPES)
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--rows", type=int, default=25)
    parser.add_argument("--shapes", action="store_true", help="operators and the shapes of their inputs")
    options = parser.parse_args()
    shape = step_time.SHAPES[options.shape]
    model, tokens = shape.model(), shape.tokens()
    for variant in options.variants:
        step = step_time.make_step(model, tokens, variant, options.ratio)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        activities = [ProfilerActivity.CUDA, ProfilerActivity.CPU]
        with profile(activities=activities, record_shapes=options.shapes) as profiler:
            for _ in range(3):
                step()
            torch.cuda.synchronize()
        events = profiler.key_averages(group_by_input_shape=options.shapes)
        # Kernels, or the operators that launched them (with the shapes of their inputs).
        kind = "CPU" if options.shapes else "CUDA"
        events = [event for event in events if event.self_device_time_total and event.device_type.name == kind]
        total = sum(event.self_device_time_total for event in events)
        print(f"{variant}: {total / 3e3:.1f} ms of kernels in a step")
        for event in sorted(events, key=lambda event: -event.self_device_time_total)[: options.rows]:
            shapes = [shape for shape in event.input_shapes if shape] if options.shapes else ""
            print(f"{event.self_device_time_total / 3e3:8.2f} ms {event.count / 3:5.0f}x  {event.key[:60]} {shapes}")


if __name__ == "__main__":
    main()
