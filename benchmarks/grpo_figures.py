"""The JSON, the table and the plot of :mod:`benchmarks.grpo_gsm8k`, from its runs."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import _record
from benchmarks._grpo_run import ARMS, CONTROL

_LAST = 10  # steps whose reward is the reward at the end
_COLOURS = dict(zip(ARMS, ("0.45", "#e9a23b", "#2a6f97", "#7b4ea3"), strict=True))


def write_result(
    name: str,
    runs: Sequence[dict[str, Any]],
    *,
    alone: dict[str, list[float]],
    settings: dict[str, Any],
    folder: Path,
) -> None:
    """Write the JSON and the plot of the seeds that every arm has run, and print the table.

    Arms are compared at the last evaluation that all runs of a seed have come to.

    Args:
        name: Of the files.
        runs: What :func:`benchmarks._grpo_run.train` leaves, finished or not.
        alone: Seconds of single updates of each arm with the device to itself.
        settings: Of the runs.
        folder: For the files.
    """
    runs = [run for run in runs if len(run["evaluations"]) > 1]
    arms = [arm for arm in ARMS if any(run["arm"] == arm for run in runs)]
    of = {(run["arm"], run["seed"]): run for run in runs}
    seeds = sorted({run["seed"] for run in runs if all((arm, run["seed"]) in of for arm in arms)})
    if not seeds:
        print("no seed has come to its second evaluation in every arm", flush=True)
        return
    at = {seed: max(set.intersection(*(_evaluated(of[arm, seed]) for arm in arms))) for seed in seeds}
    seeds = [seed for seed in seeds if at[seed]]
    if not seeds:
        print("no seed has an evaluation in common between its arms", flush=True)
        return
    control = CONTROL if CONTROL in arms else arms[0]
    rows = {arm: _row([of[arm, seed] for seed in seeds], [of[control, seed] for seed in seeds], at) for arm in arms}
    for arm, row in rows.items():
        row["update_seconds_alone"] = _record.summary(alone[arm]) if alone.get(arm) else None
    settings = settings | {"seeds": seeds, "arms": {arm: ARMS[arm] for arm in arms}}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = _record.write(name, rows, settings=settings, control=control, device=device, folder=folder)
    draw(_record.load(name, folder=folder), path.with_suffix(".png"))
    report(rows)


def _row(runs: list[dict[str, Any]], control: list[dict[str, Any]], at: dict[int, int]) -> dict[str, Any]:
    """The numbers of an arm, beside the control's runs of the same seeds."""
    before = [run["evaluations"][0]["right"] for run in runs]
    after = [_right(run, at[run["seed"]]) for run in runs]
    gains = [
        mine - theirs
        for run, other in zip(runs, control, strict=True)
        for mine, theirs in zip(_right(run, at[run["seed"]]), _right(other, at[run["seed"]]), strict=True)
    ]
    rewards = [
        statistics.fmean(
            step["reward"]
            for step in run["steps"]
            if "reward" in step and at[run["seed"]] - _LAST < step["step"] <= at[run["seed"]]
        )
        for run in runs
    ]
    seconds = [statistics.median(step["update_seconds"] for step in run["steps"]) for run in runs]
    return {
        **_record.summary([statistics.fmean(one) for one in after]),
        "unit": "accuracy",
        "steps": [at[run["seed"]] for run in runs],
        "before": statistics.fmean(map(statistics.fmean, before)),
        "interval": interval([value for one in after for value in one]),
        "over_control": {"mean": statistics.fmean(gains), "interval": interval(gains)},
        "reward": _record.summary(rewards),
        "update_seconds": _record.summary(seconds),
        "runs": runs,
    }


def _evaluated(run: dict[str, Any]) -> set[int]:
    return {one["step"] for one in run["evaluations"]}


def _right(run: dict[str, Any], step: int) -> list[float]:
    return next(one["right"] for one in run["evaluations"] if one["step"] == step)


def interval(values: Sequence[float]) -> list[float]:
    """95% interval of a mean over problems, by its standard error; what differs between seeds is not in it."""
    if len(values) < 2:
        return [values[0], values[0]]
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return [mean - 1.96 * error, mean + 1.96 * error]


def report(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table in Markdown."""
    print("| | runs | steps | reward at the end | accuracy before | after | over the full update | s per update |")
    print("|---|---|---|---|---|---|---|---|")
    for arm, row in rows.items():
        gain = row["over_control"]
        difference = f"{gain['mean']:+.1%} [{gain['interval'][0]:+.1%}, {gain['interval'][1]:+.1%}]"
        seconds = (row["update_seconds_alone"] or row["update_seconds"])["median"]
        print(
            f"| {arm} | {row['samples']} | {min(row['steps'])} | {row['reward']['median']:.3f} | {row['before']:.1%} "
            f"| {row['median']:.1%} | {difference} | {seconds:.3f} |",
            flush=True,
        )


def draw(result: dict[str, Any], path: Path) -> None:
    """Reward and accuracy against rollouts and against update seconds: the mean of the seeds, and each of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row", sharex="col")
    per_step = result["settings"]["rollouts"] // 2
    for arm, row in result["rows"].items():
        seconds = (row["update_seconds_alone"] or row["update_seconds"])["median"]
        rewards = [
            {step["step"]: step["reward"] for step in run["steps"] if "reward" in step} for run in row["runs"]
        ]  # fmt: skip
        answers = [{one["step"]: one["right"] for one in run["evaluations"]} for run in row["runs"]]
        for column, factor in enumerate((per_step, seconds)):
            for found in rewards:
                at = [step * factor for step in found]
                panels[0][column].plot(
                    at, running_mean(list(found.values()), 5), color=_COLOURS[arm], lw=0.5, alpha=0.5
                )
            shared = sorted(set.intersection(*map(set, rewards)))
            mean = running_mean([statistics.fmean(found[step] for found in rewards) for step in shared], 5)
            panels[0][column].plot([step * factor for step in shared], mean, color=_COLOURS[arm], lw=1.6, label=arm)
            shared = sorted(set.intersection(*map(set, answers)))
            pooled = [[value for found in answers for value in found[step]] for step in shared]
            errors = [statistics.fmean(one) - interval(one)[0] for one in pooled]
            panels[1][column].errorbar(
                [step * factor for step in shared], list(map(statistics.fmean, pooled)), yerr=errors,
                color=_COLOURS[arm], lw=1.6, marker="o", ms=3, capsize=3,
            )  # fmt: skip
    panels[0][0].set_ylabel("reward (mean of five updates)")
    panels[1][0].set_ylabel("held-out accuracy, 95% over problems")
    panels[1][0].set_xlabel("rollouts")
    alone = all(row["update_seconds_alone"] for row in result["rows"].values())
    panels[1][1].set_xlabel("seconds of updates" + (", alone on the device" if alone else ", beside other runs"))
    panels[0][0].legend(frameon=False, fontsize=8)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    settings = result["settings"]
    title = f"GRPO on GSM8K, {settings['model']}, {len(settings['seeds'])} seeds: {result['environment']['device']}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def running_mean(values: list[float], width: int) -> list[float]:
    """Means of the last ``width`` values."""
    return [statistics.fmean(values[max(0, at - width + 1) : at + 1]) for at in range(len(values))]
