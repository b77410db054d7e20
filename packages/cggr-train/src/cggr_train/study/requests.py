"""The requests of a study to its workers, stage by stage."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cggr_core.settings import SUPERVISED
from cggr_train.study.analysis import PLACES
from cggr_train.study.arms import Arm
from cggr_train.study.plan import Plan
from cggr_train.study.pool import Request
from cggr_train.study.settings import StudySettings

TUNING_SEED = 1000
"""Added to the first seed to try learning rates; no compared run uses that seed."""


def changes(arm: Arm) -> dict[str, Any]:
    """What was found about an arm since planning, for the workers."""
    return {"micro_batch": arm.micro_batch, "checkpointing": arm.checkpointing, "learning_rate": arm.learning_rate}


def fit_requests(arms: Sequence[Arm], limits: Mapping[str, int]) -> Iterator[Request]:
    """Requests for how many sequences of each arm stay within its limit, in bytes."""
    for arm in arms:
        yield _request("fit", arm, do="fit", limit=limits[arm.name])


def timing_requests(settings: StudySettings, arms: Sequence[Arm]) -> Iterator[Request]:
    """Requests to time each arm's step, in turns."""
    turns = settings.timing_turns
    for turn, arm in itertools.product(range(turns), arms):
        yield _request("timing", arm, {"turn": turn}, do="time", seconds=settings.calibration_seconds / turns)


def rate_requests(settings: StudySettings, arms: Sequence[Arm], plan: Plan) -> Iterator[Request]:
    """Requests to try each arm at each learning rate, on separate text."""
    share = settings.rate_share
    for arm, rate in itertools.product(arms, settings.rates):
        yield _request(
            "rate", arm, {"rate": rate},
            do="train",
            changes=changes(arm) | {"learning_rate": rate},
            seed=settings.train.seed + TUNING_SEED,
            points=[max(1, round(share * plan.readings[arm.name]["time"]))],
            warmup_steps=share * plan.warmup_steps,
            eval_sequences=settings.train.eval_sequences,
            save_model=False,
            tuning=True,
        )  # fmt: skip


def run_requests(settings: StudySettings, arms: Sequence[Arm], plan: Plan, seeds: Sequence[int]) -> Iterator[Request]:
    """The runs. The first run of the standard arm comes first and saves its model."""
    for seed, arm in itertools.product(seeds, arms):
        asked = settings.accuracy and arm.name in (settings.accuracy_of or {arm.name})
        yield _request(
            "run", arm, {"seed": seed},
            do="train",
            seed=seed,
            points=plan.points[arm.name],
            warmup_steps=plan.warmup_steps,
            eval_sequences=plan.eval_sequences,
            save_model=arm is arms[0] and seed == seeds[0],
            accuracy_at={name: plan.readings[arm.name][name] for name in settings.accuracy_readings if asked},
        )  # fmt: skip


def gradient_requests(arms: Sequence[Arm], weights: Path, seed: int) -> Iterator[Request]:
    """Gradients at the start and at the end of the standard run."""
    drawn = [arm for arm in arms if arm.role in ("equal_cost", "random", "asked") and not arm.scores_from_own_run]
    for (at, place), arm in itertools.product(zip(PLACES, (None, str(weights)), strict=True), drawn):
        yield _request("gradients", arm, {"at": at}, do="gradients", weights=place, seed=seed)


def kept_requests(arms: Sequence[Arm], weights: Path, seed: int) -> Iterator[Request]:
    """One request for which tokens the selecting arms keep at the end of the standard run."""
    routed = [
        arm.name for arm in arms
        if arm.method != "standard" and arm.routing.gradient != "sequence" and not arm.scores_from_own_run
        and arm.routing.selection != SUPERVISED
    ]  # fmt: skip
    if routed:
        yield Request("kept", {}, {"do": "kept", "arms": routed, "weights": str(weights), "seed": seed})


def _request(event: str, arm: Arm, fields: Mapping[str, Any] | None = None, **body: Any) -> Request:
    return Request(event, {"arm": arm.name, **(fields or {})}, {"arms": [arm.name], "changes": changes(arm), **body})
