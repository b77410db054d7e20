"""A study's findings in plain sentences."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from cggr_train.display import format_bytes
from cggr_train.report.text import against, difference
from cggr_train.study.analysis import controls
from cggr_train.study.frontier import (
    Point,
    is_chosen_for_memory,
    measured_by_accuracy,
    points,
    recommended,
    with_less_memory,
)

if TYPE_CHECKING:
    from cggr_train.study.analysis import Outcome
    from cggr_train.study.arms import Arm

MANY = 3


def verdict(outcome: Outcome) -> list[str]:
    """Which arm to use, how the best requested arm compares with each control, and what it costs.

    The first sentence follows from the frontier of quality against memory (:mod:`cggr_train.study.frontier`). Diverged
    arms are named but not compared.

    Args:
        outcome: The study.
    """
    losses = {name: found.loss.mean for name, found in outcome.comparisons["time"].items()}
    first = outcome.arm(min(losses, key=losses.__getitem__))
    lowest = f"Lowest held-out loss in the same time: {first.title} ({losses[first.name]:.3f})."
    asked = [arm for arm in outcome.arms if arm.role == "asked"] or [a for a in outcome.arms if a.role == "random"]
    compared = [arm for arm in asked if arm.name in losses]
    if compared:
        best = min(compared, key=lambda arm: losses[arm.name])
        lines = [_recommendation(outcome), lowest, *_compare_with_controls(outcome, best, compared)]
    else:
        nothing = "None of the requested arms kept a finite loss at this learning rate."
        lines = [_recommendation(outcome), nothing if asked else "No routed arm is left to compare.", lowest]
    if outcome.diverged:
        lines.insert(1, _diverged(outcome))
    lines += [f"Left out: {reason}." for reason in outcome.left_out.values()]
    if outcome.seeds == 1:
        lines.append("One seed cannot rule out chance: repeat with --seeds 3 or more before you decide.")
    if len(compared) > MANY:
        lines.append(
            f"Picking the best of {len(compared)} settings by the same numbers overestimates it: confirm it in a "
            "separate study with other seeds."
        )
    return lines


def _compare_with_controls(outcome: Outcome, best: Arm, compared: list[Arm]) -> list[str]:
    """How the best arm compares with its controls."""
    comparison = outcome.comparisons["time"][best.name]
    lines = [
        f"In the same time {_named(best, compared)} ({comparison.loss.mean:.3f}) is "
        + "; ".join(against(value, outcome.arm(name).title) for name, value in comparison.against.items())
        + ".",
        f"After the same number of tokens seen it is "
        f"{against(outcome.comparisons['tokens'][best.name].against['standard'], outcome.arms[0].title)}.",
        _cost(outcome, best),
    ]
    if best.random in comparison.against and best.method != "random":
        lines.append(_scoring(outcome, best))
    return [*lines, *_gradient(outcome, best)]


def _diverged(outcome: Outcome) -> str:
    arms = []
    for name, steps in outcome.diverged.items():
        of = f"{len(steps)} of {outcome.seeds} seeds, " if outcome.seeds > 1 else ""
        first = "first at" if len(steps) > 1 else "at"
        arms.append(f"{outcome.arm(name).title} ({of}{first} step {min(steps.values()):,})")
    return (
        f"Diverged, and left out of all comparisons: {'; '.join(arms)}. Try another study with a lower --learning-rate "
        "for every arm."
    )


def _recommendation(outcome: Outcome) -> str:
    if outcome.seeds == 1:
        return "Undecided: with one seed, a difference cannot be distinguished from chance."
    every = points(outcome)
    chosen = recommended(every)
    arm, best = outcome.arm(chosen.name), min(every, key=lambda point: point.mean_cost)
    gone = [outcome.arm(name).title for name in controls(arm) if name in outcome.diverged]
    if gone:
        return f"Undecided: {arm.title} would be recommended, but {' and '.join(gone)}, its control, diverged."
    what, most = ("accuracy", "highest") if measured_by_accuracy(outcome) else ("held-out loss", "lowest")
    if chosen is best:
        why = f"its {what} in the same time, {_quality(outcome, chosen)}, is the {most}"
    else:
        why = (
            f"its {what} in the same time, {_quality(outcome, chosen)}, is statistically indistinguishable from the "
            f"{most}, {_quality(outcome, best)} of {outcome.arm(best.name).title}, and it "
            + ("takes less memory" if is_chosen_for_memory(every, chosen, best) else "is simpler")
        )
    less = [f"{outcome.arm(p.name).title} ({_quality(outcome, p)} at {format_bytes(p.peak_bytes)})"
            for p in with_less_memory(every, chosen)]  # fmt: skip
    short = f"; with less memory than its {format_bytes(chosen.peak_bytes)}: {', '.join(less)}" if less else ""
    return f"Use {arm.title}: {why}{short}."


def _quality(outcome: Outcome, point: Point) -> str:
    return f"{point.quality.mean:.1%}" if measured_by_accuracy(outcome) else f"{point.quality.mean:.3f}"


def _named(best: Arm, asked: list[Arm]) -> str:
    return best.title if len(asked) == 1 else f"the best of the {len(asked)} settings, {best.title}"


def _cost(outcome: Outcome, best: Arm) -> str:
    standard = outcome.arms[0].name
    time = outcome.step_seconds[best.name][0] / outcome.step_seconds[standard][0]
    own, its = (
        outcome.memory[name]["peak_bytes"] - outcome.memory[name]["start_bytes"] for name in (best.name, standard)
    )
    # on a CPU, the resident set of a small step may not grow at all
    memory = f", and adds {max(0, own) / its:.2f} of the memory" if its > 0 else ""
    return f"Its step takes {time:.2f} of the standard step's time, scoring included{memory}."


def _scoring(outcome: Outcome, best: Arm) -> str:
    assert best.random is not None
    own, random = (outcome.step_seconds[name][0] for name in (best.name, best.random))
    gain = outcome.comparisons["tokens"][best.name].against[best.random]
    return (
        f"Choosing by score makes the step {own / random:.2f} times as long as choosing at random, and changes "
        f"the loss after the same tokens by {difference(gain)}."
    )


def _gradient(outcome: Outcome, best: Arm) -> list[str]:
    place = "end" if "end" in outcome.gradients else next(iter(outcome.gradients), "end")
    found = outcome.gradients.get(place, {})
    cosines = {
        outcome.arm(name).title: statistics.fmean(found[name]["cosine"])
        for name in (best.name, best.random, best.equal_cost)
        if name is not None and name in found
    }
    if not cosines:
        return []
    text = ", ".join(f"{label} {value:.2f}" for label, value in cosines.items())
    return [f"Cosine between one step's gradient and the full gradient at the {place} of the standard run: {text}."]
