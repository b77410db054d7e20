"""What ``dynamic_threshold`` does to learning and to the time of a step, against fixed keep ratios.

``python -m benchmarks.dynamic_threshold cpu`` (two cores, ten minutes), ``... 40m`` and ``... 135m`` (one CUDA device).
A model is trained from scratch on the standard library's own source, the same text in the same order for every arm: a
ratio moved by the model's confidence; one fixed at the starting value; and, as the control, one fixed at the mean of
what the moved ratio kept. That control costs as much as the moved ratio, so the difference in held-out loss is the
value of moving it. The time of a step is measured on a fresh model, with the number of slots that its confidence
implies.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import _record
from benchmarks._language_model import WARMUP, Size, training
from cggr_core import CGGRModel
from cggr_train.data.batches import in_order
from cggr_train.evaluate import heldout_loss

RATIO = 0.25
SIZES = {
    "cpu": Size(4, 128, 4, 1024, 2_000_000, 8, 128, 400, 100, 2e-3, "cpu"),
    "40m": Size(12, 512, 8, 8192, 16_000_000, 16, 512, 800, 200, 1e-3, "cuda"),
    "135m": Size(30, 576, 9, 8192, 16_000_000, 8, 1024, 500, 125, 1e-3, "cuda"),
}
FIXED, MATCHED = f"fixed at {RATIO}", "fixed at the mean of what was kept"
# How far confidence moves the ratio: the default, and the most that the bounds (half and twice) allow.
SENSITIVITIES = {"dynamic, sensitivity 0.5": 0.5, "dynamic, sensitivity 2": 2.0}


class Run(NamedTuple):
    """One training: held-out losses and mean keep ratios, each up to the same steps."""

    losses: list[float]
    ratios: list[float]


def wrap(size: Size, seed: int, ratio: float, sensitivity: float | None) -> CGGRModel:
    """A fresh model at a fixed ratio, or with the confidence moving it."""
    moved: dict[str, Any] = {}
    if sensitivity is not None:
        moved = {"dynamic_threshold": True, "threshold_sensitivity": sensitivity}
    return CGGRModel(size.model(seed), min_tokens_ratio=ratio, seed=seed, **moved).train()


def train(wrapped: CGGRModel, size: Size, seed: int, text: tuple[np.ndarray, np.ndarray], seconds: float) -> Run:
    """One training, stopped after ``seconds`` at the latest."""
    start, run, kept = time.monotonic(), Run([], []), []
    heldout = in_order(text[1], length=size.length, batch_size=size.batch, limit=64)
    for step, _ in training(wrapped, size, text[0], seed=seed):
        kept.append(wrapped.metrics["keep_ratio"])
        if step % size.every == 0:
            with size.precision():
                run.losses.append(heldout_loss(wrapped.model, heldout, device=torch.device(size.device)))
            run.ratios.append(float(torch.stack(kept).mean()))
            if time.monotonic() - start > seconds:
                break
    return run


def step_seconds(size: Size, text: tuple[np.ndarray, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Time of forward, loss and backward: a fixed ratio, the moved one, and one fixed at the mean of the moved one."""
    input_ids = in_order(text[0], length=size.length, batch_size=size.batch, limit=size.batch)[0].to(size.device)

    def step_of(wrapped: CGGRModel) -> Callable[[], None]:
        def step() -> None:
            with size.precision():
                loss = wrapped(input_ids, labels=input_ids)
            loss.backward()
            wrapped.model.zero_grad(set_to_none=True)

        return step

    sensitivity = SENSITIVITIES["dynamic, sensitivity 0.5"]
    moved = wrap(size, 0, RATIO, sensitivity)
    steps = {"dynamic": step_of(moved)}
    for _ in range(2):  # the second step uses the confidence of the first
        steps["dynamic"]()
    slots = moved.schedule.capacity(size.length) / size.length
    steps |= {FIXED: step_of(wrap(size, 0, RATIO, None)), "fixed at as many slots": step_of(wrap(size, 0, slots, None))}
    rows = _record.measure(steps, control="fixed at as many slots", device=size.device, repeats=20, calls=3)
    return {f"step, {name}": row for name, row in rows.items()}


def rows_of(runs: dict[str, list[Run]]) -> dict[str, dict[str, Any]]:
    """The arms' last losses over the seeds, and their differences from the controls of equal cost."""
    rows: dict[str, dict[str, Any]] = {}
    for name, of_seeds in runs.items():
        last = _record.summary([run.losses[-1] for run in of_seeds])
        curves = {"losses": [run.losses for run in of_seeds], "keep_ratios": [run.ratios for run in of_seeds]}
        rows[name] = last | {"unit": "nat"} | curves
    for name in SENSITIVITIES:
        for control in (f"{name}: {MATCHED}", FIXED):
            pairs = zip(runs[name], runs[control], strict=True)
            gains = [moved.losses[-1] - fixed.losses[-1] for moved, fixed in pairs]
            rows[f"{name} - {control.removeprefix(f'{name}: ')}"] = _record.summary(gains) | {"unit": "nat"}
    return rows


def main() -> None:
    """Time the step, train every arm at every seed, and write the JSON after each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the size's own")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all trainings together, roughly")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the JSON")
    options = parser.parse_args()
    size = SIZES[options.size]
    size = replace(size, steps=options.steps or size.steps, every=min(size.every, options.steps or size.every))
    text, timed = size.text(), step_seconds(size, size.text())
    seconds = options.seconds / (len(options.seeds) * (2 * len(SENSITIVITIES) + 1))
    runs: dict[str, list[Run]] = {FIXED: []}
    for done, seed in enumerate(options.seeds, 1):
        of_seed = {FIXED: train(wrap(size, seed, RATIO, None), size, seed, text, seconds)}
        for name, sensitivity in SENSITIVITIES.items():
            of_seed[name] = train(wrap(size, seed, RATIO, sensitivity), size, seed, text, seconds)
            kept = of_seed[name].ratios[-1]
            of_seed[f"{name}: {MATCHED}"] = train(wrap(size, seed, kept, None), size, seed, text, seconds)
        for name, run in of_seed.items():
            print(f"seed {seed}  {name:55} loss {run.losses[-1]:.4f}  kept {run.ratios[-1]:.3f}", flush=True)
            runs.setdefault(name, []).append(run)
        points = min(len(run.losses) for of_seeds in runs.values() for run in of_seeds)
        even = {
            name: [Run(run.losses[:points], run.ratios[:points]) for run in of_seeds] for name, of_seeds in runs.items()
        }
        settings = asdict(size) | {"steps": (points - 1) * size.every, "keep_ratio": RATIO, "warmup": WARMUP}
        settings |= {"seed": options.seeds[:done], "optimizer": "AdamW", "sensitivities": SENSITIVITIES}
        rows = rows_of(even) | timed
        name = f"dynamic_threshold_{options.size}"
        path = _record.write(name, rows, settings=settings, control=FIXED, device=size.device, folder=options.output)
    print(path)
    for name, row in rows.items():
        low, high = row["spread"]
        print(f"{name:66} {row['median']:.4f} [{low:.4f}, {high:.4f}] {row['unit']}")


if __name__ == "__main__":
    main()
