"""What a study of the frontier knows before its runs: how arms fit into memory, their steps, the trials of rates."""

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import _record
from cggr_train.device import pick_device
from cggr_train.log import read_log
from cggr_train.study import StudySettings
from cggr_train.study.arms import load_arms
from cggr_train.study.run import RESULTS


def write_trials(folder: Path, asked: StudySettings, arguments: argparse.Namespace, name: str) -> Path:
    """What is known before the runs: how each arm fits, its step, and what a short trial at each rate came to.

    Trials take a share of every arm's time, the same for all, at one seed; the loss is that of sequences that rates are
    chosen by.
    """
    records = read_log(folder / RESULTS)
    found: dict[str, dict[str, Any]] = {}
    for arm in load_arms(folder):
        own = [record for record in records if record.get("arm") == arm.name]
        timings = [record for record in own if record["event"] == "timing"]
        if not timings:
            continue
        fits = [record for record in own if record["event"] == "fit"]
        found[arm.name] = {
            **_record.summary([seconds for record in timings for seconds in record["step_seconds"]]),
            "unit": "s",
            "label": arm.label,
            "batch": arm.batch_size,
            "memory": {"peak_bytes": timings[-1]["peak_bytes"], "start_bytes": timings[-1]["start_bytes"], "unit": "B"},
            "fit": {key: fits[-1][key] for key in ("micro_batch", "checkpointing", "peak_bytes")} if fits else None,
            "trials": {
                f"{record['rate']:g}": {
                    "steps": record["points"][-1]["step"],
                    "tokens": record["points"][-1]["tokens"],
                    "loss": record["points"][-1]["heldout_loss"],
                }
                for record in own
                if record["event"] == "rate" and "diverged" not in record
            },
        }
    train = asked.train
    noted = {
        **{key: getattr(train, key) for key in ("length", "batch_size", "steps", "seconds", "seed", "weight_decay")},
        **{key: getattr(asked, key) for key in ("memory_limit", "rates", "rate_share", "parallel")},
        "model": arguments.model.name,
        "supervised": records[0].get("supervised"),
        "loss_before": next((r["points"][0]["heldout_loss"] for r in records if r["event"] == "rate"), None),
    }
    device = pick_device(arguments.device)
    return _record.write(
        f"{name}_trials", found, settings=noted, control="standard", device=device, folder=arguments.results
    )


def draw_trials(path: Path) -> None:
    """A point for each arm of :func:`write_trials`: its best trial against the peak memory of its step."""
    rows = _record.load(path.stem, folder=path.parent)["rows"]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.subplots()
    for row in rows.values():
        if row["trials"]:
            place = row["memory"]["peak_bytes"] / 1e9, min(trial["loss"] for trial in row["trials"].values())
            axes.plot(*place, "o", color="0.45" if row["label"].startswith("standard") else "#2a6f97")
            axes.annotate(row["label"], place, xytext=(6, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("peak memory of a step, GB")
    axes.set_ylabel("loss after the same time, nats per answer token")
    axes.margins(x=0.25, y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path.with_suffix(".png"), dpi=150)
