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
    options = parser.parse_args()
    shape = step_time.SHAPES[options.shape]
    model, tokens = shape.model(), shape.tokens()
    for variant in options.variants:
        step = step_time.make_step(model, tokens, variant, options.ratio)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            for _ in range(3):
                step()
            torch.cuda.synchronize()
        events = [
            event for event in profiler.key_averages() if event.device_time_total and event.device_type.name == "CUDA"
        ]
        total = sum(event.self_device_time_total for event in events)
        print(f"{variant}: {total / 3e3:.1f} ms of kernels in a step")
        for event in sorted(events, key=lambda event: -event.self_device_time_total)[: options.rows]:
            print(f"{event.self_device_time_total / 3e3:8.2f} ms {event.count / 3:7.0f}x  {event.key[:100]}")


if __name__ == "__main__":
    main()
