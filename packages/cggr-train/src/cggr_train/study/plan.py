"""How long each arm trains, and where its curve is read, so that arms meet at equal tokens, kept tokens and time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cggr_train.study.arms import Arm
from cggr_train.study.context import WARMUP
from cggr_train.study.settings import StudySettings

READINGS = ("tokens", "kept", "time")
EVALUATION_SHARE = 0.03
FEWEST_SEQUENCES = 8


class Plan(NamedTuple):
    """The plan for all arms.

    Attributes:
        amounts: For each reading, the amount at which all arms are compared: tokens seen, tokens kept, and seconds of
            training (steps × time per step, measured alone).
        readings: For each arm, the step at which it reaches each amount.
        points: For each arm, the steps after which it is evaluated, readings included.
        warmup_steps: Steps over which every arm's learning rate warms up.
        eval_sequences: Held-out sequences of an evaluation, the same for all: the requested number, or as many as keep
            all evaluations of the standard run within :data:`EVALUATION_SHARE` of its training, but at least
            :data:`FEWEST_SEQUENCES`.
    """

    amounts: dict[str, float]
    readings: dict[str, dict[str, int]]
    points: dict[str, list[int]]
    warmup_steps: float
    eval_sequences: int


def make_plan(
    settings: StudySettings, arms: Sequence[Arm], step_seconds: Mapping[str, float], *, supervised: float = 1.0
) -> Plan:
    """Lengths and readings from the measured time of each arm's step.

    The standard arm trains for the requested steps or seconds. Every other arm trains until it has seen as many tokens,
    used as much time, or both, as set by ``settings.equal``. Each comparison is read where the arm that gets least far
    ends.

    Args:
        settings: The study.
        arms: Its arms; the first one is the standard arm.
        step_seconds: Seconds of a step, by name.
        supervised: Share of all tokens that are supervised.
    """
    train = settings.train
    standard = arms[0].name
    steps = train.steps or max(1, round((train.seconds or 0.0) / step_seconds[standard]))
    per_step = {
        arm.name: {
            "tokens": float(arm.batch_size * train.length),
            "kept": arm.batch_size * (train.length - 1) * supervised * arm.kept_share,
            "time": step_seconds[arm.name],
        }
        for arm in arms
    }
    wanted = {name: steps * per_step[standard][name] for name in settings.equal}
    totals = {
        arm.name: max(max(1, math.ceil(wanted[name] / per_step[arm.name][name] - 0.5)) for name in wanted)
        for arm in arms
    }
    amounts = {name: min(totals[arm.name] * per_step[arm.name][name] for arm in arms) for name in READINGS}
    readings = {
        arm.name: {
            name: min(max(1, round(amounts[name] / per_step[arm.name][name])), totals[arm.name]) for name in READINGS
        }
        for arm in arms
    }
    points = {
        name: sorted(
            {*readings[name].values(), *(max(1, total * n // settings.evaluations)
                                         for n in range(1, settings.evaluations + 1))}
        )
        for name, total in totals.items()
    }  # fmt: skip
    # a training step costs about three forward passes
    affordable = int(EVALUATION_SHARE * 3 * steps * train.batch_size / len(points[standard]))
    sequences = min(train.eval_sequences, max(FEWEST_SEQUENCES, affordable))
    return Plan(amounts, readings, points, WARMUP * steps, sequences)
