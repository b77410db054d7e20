"""The JSON, the table and the plot of :mod:`benchmarks.grpo_gsm8k`, from its runs."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import _record
from benchmarks._grpo_run import ARMS, CONTROL

_LAST = 10  # steps whose reward is the reward at the end
_COLOURS = dict(zip(ARMS, ("0.45", "#e9a23b", "#2a6f97", "#7b4ea3"), strict=True))


def write_result(
    name: str,
    runs: Sequence[dict[str, Any]],
    *,
    alone: dict[str, list[float]],
    folder: Path,
) -> None:
    """Write the JSON and the plot of the seeds that every arm has finished, and print the table.

    Arms are compared at the last evaluation that all runs of a seed reached; if there is none, each at its own last
    one, whose step is reported.

    Args:
        name: Of the files.
        runs: The records of :func:`benchmarks._grpo_run.train`, finished or not.
        alone: Seconds of single updates of each arm with the device to itself.
        folder: For the files.
    """
    runs = [run for run in runs if len(run["evaluations"]) > 1]
    arms = [arm for arm in ARMS if any(run["arm"] == arm for run in runs)]
    of = {(run["arm"], run["seed"]): run for run in runs}
    seeds = sorted({run["seed"] for run in runs if all((arm, run["seed"]) in of for arm in arms)})
    if not seeds:
        print("no seed has reached its second evaluation in every arm", flush=True)
        return
    at: dict[tuple[str, int], int] = {}
    for seed in seeds:
        shared = max(set.intersection(*(_evaluated(of[arm, seed]) for arm in arms)))
        at |= {(arm, seed): shared or of[arm, seed]["evaluations"][-1]["step"] for arm in arms}
    control = CONTROL if CONTROL in arms else arms[0]
    rows = {arm: _row([of[arm, seed] for seed in seeds], [of[control, seed] for seed in seeds], at) for arm in arms}
    for arm, row in rows.items():
        row["update_seconds_alone"] = _record.summary(alone[arm]) if alone.get(arm) else None
    first = of[control, seeds[0]]
    settings = first["settings"] | {"seed": 0, "seeds": seeds, "arms": {arm: ARMS[arm] for arm in arms}}
    path = _record.write(
        name, rows, settings=settings, control=control, made_in=first["environment"], folder=folder
    )  # fmt: skip
    draw(_record.load(name, folder=folder), path.with_suffix(".png"))
    report(rows)


def _row(runs: list[dict[str, Any]], control: list[dict[str, Any]], at: dict[tuple[str, int], int]) -> dict[str, Any]:
    """The numbers of an arm, beside the control's runs of the same seeds."""
    before = [_right(run, 0) for run in runs]
    steps = [at[run["arm"], run["seed"]] for run in runs]
    after = [_right(run, step) for run, step in zip(runs, steps, strict=True)]
    gains = [
        mine - theirs
        for one, other in zip(after, control, strict=True)
        for mine, theirs in zip(one, _right(other, at[other["arm"], other["seed"]]), strict=True)
    ]
    rewards = [
        statistics.fmean(
            step["reward"] for step in run["steps"] if "reward" in step and last - _LAST < step["step"] <= last
        )
        for run, last in zip(runs, steps, strict=True)
    ]
    seconds = [statistics.median(step["update_seconds"] for step in run["steps"]) for run in runs]
    ahead = [gap for run, other in zip(runs, control, strict=True) for gap in _reward_gaps(run, other)]
    return {
        **_record.summary([statistics.fmean(one) for one in after]),
        "unit": "accuracy",
        "steps": steps,
        "before": statistics.fmean(map(statistics.fmean, before)),
        "interval": interval([value for one in after for value in one]),
        "over_control": {"mean": statistics.fmean(gains), "interval": interval(gains)},
        "reward": _record.summary(rewards),
        "reward_over_control": {"mean": statistics.fmean(ahead), "interval": interval(ahead)},
        "update_seconds": _record.summary(seconds),
        "runs": runs,
    }


def _reward_gaps(run: dict[str, Any], control: dict[str, Any]) -> list[float]:
    """Differences in reward between the generations that both arms made, which are for the same prompts."""
    mine, theirs = (
        {step["step"]: step["reward"] for step in one["steps"] if "reward" in step} for one in (run, control)
    )
    return [mine[step] - theirs[step] for step in sorted(mine.keys() & theirs.keys())]


def _evaluated(run: dict[str, Any]) -> set[int]:
    return {one["step"] for one in run["evaluations"]}


def _right(run: dict[str, Any], step: int) -> list[float]:
    return list(map(float, next(one["right"] for one in run["evaluations"] if one["step"] == step)))


def interval(values: Sequence[float]) -> list[float]:
    """95% interval of a mean over problems, from its standard error; it does not include variation between seeds."""
    if len(values) < 2:
        return [values[0], values[0]]
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    return [mean - 1.96 * error, mean + 1.96 * error]


def report(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table in Markdown."""
    print(
        "| | steps | accuracy before | after | over the full update | reward over the full update's "
        "| s per update, alone | beside other runs |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for arm, row in rows.items():
        gains = [_signed(row[name]) for name in ("over_control", "reward_over_control")]
        steps = ", ".join(map(str, row["steps"]))
        alone = row["update_seconds_alone"]
        print(
            f"| {arm} | {steps} | {row['before']:.1%} | {row['median']:.1%} | {gains[0]} | {gains[1]} "
            f"| {alone['median'] if alone else math.nan:.2f} | {row['update_seconds']['median']:.2f} |",
            flush=True,
        )


def _signed(gain: dict[str, Any]) -> str:
    low, high = gain["interval"]
    return f"{gain['mean']:+.1%} [{low:+.1%}, {high:+.1%}]"


def draw(result: dict[str, Any], path: Path) -> None:
    """Reward and accuracy against rollouts and against update seconds: the mean over seeds, and each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row", sharex="col")
    per_step = result["settings"]["rollouts"] // 2
    for arm, row in result["rows"].items():
        seconds = (row["update_seconds_alone"] or row["update_seconds"])["median"]
        rewards = [
            {step["step"]: step["reward"] for step in run["steps"] if "reward" in step} for run in row["runs"]
        ]  # fmt: skip
        answers = [{step: _right(run, step) for step in _evaluated(run)} for run in row["runs"]]
        for column, factor in enumerate((per_step, seconds)):
            for found in rewards:
                at = [step * factor for step in found]
                panels[0][column].plot(
                    at, running_mean(list(found.values()), 5), color=_COLOURS[arm], lw=0.5, alpha=0.5
                )
            shared = sorted(set.intersection(*map(set, rewards)))
            mean = running_mean([statistics.fmean(found[step] for found in rewards) for step in shared], 5)
            panels[0][column].plot([step * factor for step in shared], mean, color=_COLOURS[arm], lw=1.6, label=arm)
            places = _together(answers)
            errors = [statistics.fmean(right) - interval(right)[0] for _, right in places]
            panels[1][column].errorbar(
                [step * factor for step, _ in places], [statistics.fmean(right) for _, right in places], yerr=errors,
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


def _together(answers: list[dict[int, list[float]]]) -> list[tuple[float, list[float]]]:
    """Mean steps of the evaluations of several runs, and all their answers.

    Runs that were evaluated a different number of times have their first and last evaluation in common.
    """
    numbered = [sorted(found.items()) for found in answers]
    if len({len(one) for one in numbered}) > 1:
        numbered = [[one[0], one[-1]] for one in numbered]
    return [
        (statistics.fmean(step for step, _ in one), [value for _, right in one for value in right])
        for one in zip(*numbered, strict=True)
    ]


def running_mean(values: list[float], width: int) -> list[float]:
    """Means of the last ``width`` values."""
    return [statistics.fmean(values[max(0, at - width + 1) : at + 1]) for at in range(len(values))]
