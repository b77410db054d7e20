"""What a study's figures say, in plain sentences."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from cggr_train.report.text import against, difference
from cggr_train.study.analysis import controls

if TYPE_CHECKING:
    from cggr_train.study.analysis import Outcome
    from cggr_train.study.arms import Arm

MANY = 3


def verdict(outcome: Outcome) -> list[str]:
    """Who won, how the best arm stands to each control, what it costs, and what to use on this evidence.

    An arm is recommended only if it is shown to do better than every control in the same time; of two that cannot be
    told apart, the simpler one is. Arms that diverged are named, and compared with nothing.

    Args:
        outcome: The study.
    """
    losses = {name: found.loss.mean for name, found in outcome.comparisons["time"].items()}
    first = outcome.arm(min(losses, key=losses.__getitem__))
    lowest = f"Lowest held-out loss in the same time: {first.label} ({losses[first.name]:.3f})."
    asked = [arm for arm in outcome.arms if arm.role == "asked"] or [a for a in outcome.arms if a.role == "random"]
    compared = [arm for arm in asked if arm.name in losses]
    if compared:
        best = min(compared, key=lambda arm: losses[arm.name])
        recommendation, *others = _standing(outcome, best, compared)
        lines = [recommendation, lowest, *others]
    else:
        lines = ["Nothing that was asked for kept a finite loss at this learning rate: use standard training.", lowest]
    if outcome.diverged:
        lines.insert(1, _diverged(outcome))
    if outcome.seeds == 1:
        lines.append("One seed says nothing about chance: repeat with --seeds 3 or more before you decide.")
    if len(compared) > MANY:
        lines.append(
            f"The best of {len(compared)} settings was picked on these same figures, which flatters it: confirm it "
            "alone, with seeds of its own."
        )
    return lines


def _standing(outcome: Outcome, best: Arm, compared: list[Arm]) -> list[str]:
    """What to use, and how the best arm stands to its controls."""
    standing = outcome.comparisons["time"][best.name]
    lines = [
        _recommendation(outcome, best),
        f"In the same time {_named(best, compared)} ({standing.loss.mean:.3f}) is "
        + "; ".join(against(value, outcome.arm(name).label) for name, value in standing.against.items())
        + ".",
        f"After the same number of tokens seen it is "
        f"{against(outcome.comparisons['tokens'][best.name].against['standard'], outcome.arms[0].label)}.",
        _cost(outcome, best),
    ]
    if best.random in standing.against:
        lines.append(_scoring(outcome, best))
    if outcome.gradients:
        lines.append(_gradient(outcome, best))
    return lines


def _diverged(outcome: Outcome) -> str:
    arms = []
    for name, steps in outcome.diverged.items():
        of = f"{len(steps)} of {outcome.seeds} seeds, " if outcome.seeds > 1 else ""
        first = "first at" if len(steps) > 1 else "at"
        arms.append(f"{outcome.arm(name).label} ({of}{first} step {min(steps.values()):,})")
    return (
        f"Diverged, and compared with nothing: {'; '.join(arms)}. A lower --learning-rate, the same for every arm, "
        "makes another study."
    )


def _recommendation(outcome: Outcome, best: Arm) -> str:
    if outcome.seeds == 1:
        return "Undecided: with one seed a difference cannot be told from chance."
    found = outcome.comparisons["time"][best.name].against
    for name, words in (
        ("standard", "standard training"),
        (best.equal_cost, "standard training with a smaller batch, which costs as much as the routed step"),
        (best.random, "random tokens"),
    ):
        if name in found and found[name].sign >= 0:
            how = "does better here" if found[name].sign > 0 else "does as well here and is simpler"
            what = "Random" if name == best.random else outcome.arm(name).label.capitalize()
            return f"{what} {how}: use {words}."
    gone = [outcome.arm(name).label for name in controls(best) if name in outcome.diverged]
    if gone:
        return f"Undecided: {best.label} beats the controls that are left, but {' and '.join(gone)} diverged."
    return f"{best.label} does better than every control in the same time: use it here."


def _named(best: Arm, asked: list[Arm]) -> str:
    return best.label if len(asked) == 1 else f"the best of the {len(asked)} settings, {best.label}"


def _cost(outcome: Outcome, best: Arm) -> str:
    standard = outcome.arms[0].name
    time = outcome.step_seconds[best.name][0] / outcome.step_seconds[standard][0]
    adds = {
        name: max(1, outcome.memory[name]["peak_bytes"] - outcome.memory[name]["start_bytes"])
        for name in (best.name, standard)
    }
    return (
        f"Its step takes {time:.2f} of the standard step's time, scoring included, and adds "
        f"{adds[best.name] / adds[standard]:.2f} of the memory."
    )


def _scoring(outcome: Outcome, best: Arm) -> str:
    assert best.random is not None
    own, random = (outcome.step_seconds[name][0] for name in (best.name, best.random))
    gain = outcome.comparisons["tokens"][best.name].against[best.random]
    return (
        f"Choosing by score makes the step {own / random:.2f} times as long as choosing at random, and changes "
        f"the loss after the same tokens by {difference(gain)}."
    )


def _gradient(outcome: Outcome, best: Arm) -> str:
    place = "end" if "end" in outcome.gradients else next(iter(outcome.gradients))
    found = outcome.gradients[place]
    cosines = {
        outcome.arm(name).label: statistics.fmean(found[name]["cosine"])
        for name in (best.name, best.random, best.equal_cost)
        if name is not None and name in found
    }
    text = ", ".join(f"{label} {value:.2f}" for label, value in cosines.items())
    return f"Cosine of one step's gradient to the full gradient at the {place} of the standard run: {text}."
