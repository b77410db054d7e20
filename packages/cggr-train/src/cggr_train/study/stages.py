"""The stages of a study: what fits, how long steps take, learning rates, the runs, gradients, and the report."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from cggr_core.settings import SUPERVISED
from cggr_train.data import TokenStore
from cggr_train.display import mute
from cggr_train.errors import DivergedError, InputError
from cggr_train.interrupt import StopRequest
from cggr_train.log import JsonlLog, read_log
from cggr_train.study.analysis import PLACES, Outcome, analyse, step_times
from cggr_train.study.arms import Arm, load_arms
from cggr_train.study.live import LiveTable
from cggr_train.study.plan import Plan, make_plan
from cggr_train.study.pool import Pool, Request
from cggr_train.study.settings import StudySettings

RESULTS, REPORT = "results.jsonl", "report.html"
TUNING_SEED = 1000
"""Added to the first seed where learning rates are tried: none of the runs that are compared has it."""


class StudyResult(NamedTuple):
    """How a study ended."""

    outcome: Outcome | None
    """None if it was stopped before its end."""
    exit_code: int
    """0 at the end; 129, 130 or 143 after a clean stop by a signal."""


class Stages:
    """A study in its folder, as far as it has come.

    Args:
        settings: Of the study.
        folder: What :func:`cggr_train.study.run.prepare_study` wrote, and the records so far.
        console: Where progress is shown.
    """

    def __init__(self, settings: StudySettings, folder: Path, console: Console) -> None:
        self.settings, self.folder, self.console = settings, folder, console
        self.arms = load_arms(folder)
        self.left_out: dict[str, str] = {}
        self.log = JsonlLog(folder / RESULTS)
        self.records = _read_records(folder)
        first = settings.train.seed
        self.seeds = range(first, first + settings.seeds)
        self.weights = folder / "runs" / f"{self.arms[0].name}-seed{first}" / "model"
        if not self.weights.is_dir():  # later measurements need them: that run is done again
            whose = ("run", self.arms[0].name, first)
            self.records = [
                r for r in self.records
                if (r["event"], r.get("arm"), r.get("seed")) != whose or "diverged" in r
            ]  # fmt: skip

    def run(self, where: list[tuple[torch.device, int]]) -> StudyResult:
        """Measure what is not on record yet, on these devices with so many threads each, and report on all of it."""
        with StopRequest(on_hangup=lambda: mute(self.console)) as stop, Pool(self.folder, where) as pool:
            with LiveTable(self.console, self.arms, self.settings.seeds) as table:
                self.table, self.pool, self.stop = table, pool, stop
                for record in self.records:
                    table.take(record)
                self._fit_and_time()
                plan = None
                if not stop.requested:
                    times = {name: found[0] for name, found in step_times(self.records).items()}
                    supervised = self.records[0].get("supervised", 1.0)
                    plan = make_plan(self.settings, self.arms, times, supervised=supervised)
                    self._tune(plan)
                if plan is not None and not stop.requested:
                    self._train(plan)
                if not stop.requested:
                    self._compare_gradients()
            if plan is None or stop.requested:
                return StudyResult(None, stop.exit_code)
        return StudyResult(self._report(plan), 0)

    def _do(self, requests: Iterable[Request], *, alone: bool = False) -> None:
        """Run what is not on record yet, and put it there."""
        known = {_identity(record["event"], record) for record in self.records}
        missing = [request for request in requests if _identity(request.event, request.fields) not in known]
        if not missing:
            return
        for request, result in self.pool.run(
            missing, on_progress=self.table.progress, stop=lambda: self.stop.requested, alone=alone
        ):
            record = {"event": request.event, **request.fields, **result}
            self.log.write(**record)
            self.records.append(record)
            self.table.take(record)
            self._check_standard(record)

    def _check_standard(self, record: Mapping[str, Any]) -> None:
        """Other arms may diverge, and are reported so; without this one there is nothing to compare with."""
        if record["event"] == "run" and record["arm"] == self.arms[0].name and "diverged" in record:
            raise DivergedError(
                f"{self.arms[0].label}, seed {record['seed']}: {record['reason']}. Every arm is compared with this "
                "one; start another study with a lower --learning-rate"
            )

    def _fit_and_time(self) -> None:
        """Find how much of each arm's batch fits at a time, where that matters, and time its step."""
        limited = [arm for arm in self.arms if arm.memory_of is None]
        if self.settings.memory_limit is not None:
            self._fit(limited, dict.fromkeys((arm.name for arm in limited), self.settings.memory_limit))
            if not self.stop.requested:
                self._take_fits()
        self._time([arm for arm in self.arms if arm.memory_of is None])
        equal = [arm for arm in self.arms if arm.memory_of is not None]
        if equal and not self.stop.requested:
            peaks = {r["arm"]: r["peak_bytes"] for r in self.records if r["event"] == "timing"}
            self._fit([arm for arm in equal if arm.memory_of in peaks],
                      {arm.name: peaks[arm.memory_of] for arm in equal if arm.memory_of in peaks})  # fmt: skip
            if not self.stop.requested:
                self._take_fits()
                self._time([arm for arm in self.arms if arm.memory_of is not None])

    def _fit(self, arms: Sequence[Arm], limits: Mapping[str, int]) -> None:
        self.table.stage("finding how many sequences of each arm fit into memory at a time")
        self._do(
            (
                Request("fit", {"arm": arm.name},
                        {"do": "fit", "arms": [arm.name], "changes": changes(arm), "limit": limits[arm.name]})
                for arm in arms
            ),
            alone=True,
        )  # fmt: skip

    def _take_fits(self) -> None:
        """Give each arm the sizes that fit; one that does not fit at all is left out, which is said."""
        fits = {record["arm"]: record for record in self.records if record["event"] == "fit"}
        fitted: list[Arm] = []
        for arm in self.arms:
            found = fits.get(arm.name)
            if found is None:
                if arm.memory_of is None or arm.memory_of not in self.left_out:
                    fitted.append(arm)
                continue
            if found["micro_batch"] is None:
                self._exclude_arm(arm)
                continue
            size = None if found["micro_batch"] == arm.batch_size else found["micro_batch"]
            arm = dataclasses.replace(arm, micro_batch=size, checkpointing=found["checkpointing"])
            alike = next((other for other in fitted if same_training(other, arm)), None)
            if alike is None:
                fitted.append(arm)
            else:
                self.left_out[arm.name] = f"{arm.label}: the same as {alike.title}"
        self._set_arms(fitted)

    def _exclude_arm(self, arm: Arm) -> None:
        if arm is self.arms[0]:
            raise InputError(
                f"--memory-limit: not even one sequence of {arm.label} fits with checkpointing, and every arm is "
                "compared with it; give more memory or shorter sequences"
            )
        reason = "of the routed step" if arm.memory_of is not None else "that --memory-limit gives"
        self.left_out[arm.name] = f"{arm.label}: not one sequence fits into the memory {reason}"
        self.console.print(f"left out: {self.left_out[arm.name]}", highlight=False, soft_wrap=True)

    def _set_arms(self, arms: Sequence[Arm]) -> None:
        """What is compared from here on; a control that is not there is not named any more."""
        names = {arm.name for arm in arms}
        self.arms = [
            dataclasses.replace(
                arm,
                equal_cost=arm.equal_cost if arm.equal_cost in names else self.arms[0].name,
                random=arm.random if arm.random in names else None,
            )
            for arm in arms
        ]
        self.table.show_arms(self.arms)

    def _time(self, arms: Sequence[Arm]) -> None:
        self.table.stage("timing every arm's step, alone on its device")
        turns = self.settings.timing_turns
        seconds = self.settings.calibration_seconds / turns
        self._do(
            (
                Request("timing", {"arm": arm.name, "turn": turn},
                        {"do": "time", "arms": [arm.name], "changes": changes(arm), "seconds": seconds})
                for turn in range(turns)
                for arm in arms
            ),
            alone=True,
        )  # fmt: skip

    def _tune(self, plan: Plan) -> None:
        """Give each arm the learning rate that does best for it."""
        if not self.settings.rates:
            return
        self.table.stage("trying learning rates")
        seed, share = self.seeds[0] + TUNING_SEED, self.settings.rate_share
        self._do(
            Request(
                "rate",
                {"arm": arm.name, "rate": rate},
                {
                    "do": "train",
                    "arms": [arm.name],
                    "changes": changes(arm) | {"learning_rate": rate},
                    "seed": seed,
                    "points": [max(1, round(share * plan.readings[arm.name]["time"]))],
                    "warmup_steps": share * plan.warmup_steps,
                    "eval_sequences": self.settings.train.eval_sequences,
                    "save_model": False,
                    "tuning": True,
                },
            )
            for arm in self.arms
            for rate in self.settings.rates
        )
        if not self.stop.requested:
            best = best_rates(self.records)
            self._set_arms([dataclasses.replace(arm, learning_rate=best.get(arm.name)) for arm in self.arms])

    def _train(self, plan: Plan) -> None:
        self.table.stage("training")
        for record in self.records:
            self._check_standard(record)
        self._do(
            Request(
                "run",
                {"arm": arm.name, "seed": seed},
                {
                    "do": "train",
                    "arms": [arm.name],
                    "changes": changes(arm),
                    "seed": seed,
                    "points": plan.points[arm.name],
                    "warmup_steps": plan.warmup_steps,
                    "eval_sequences": plan.eval_sequences,
                    "save_model": arm is self.arms[0] and seed == self.seeds[0],
                    "accuracy_at": {
                        reading: plan.readings[arm.name][reading]
                        for reading in self.settings.accuracy_readings
                        if self.settings.accuracy and arm.name in (self.settings.accuracy_of or {arm.name})
                    },
                },
            )
            for seed in self.seeds
            for arm in self.arms
        )

    def _compare_gradients(self) -> None:
        """Gradients at the start and at the end of the standard run, and what each arm keeps there."""
        self.table.stage("comparing gradients and kept tokens")
        seed, weights = self.seeds[0], str(self.weights)
        requests = []
        if self.settings.draws and self._has_whole_batches():
            drawn = [
                arm.name for arm in self.arms
                if arm.role in ("equal_cost", "random", "asked") and not arm.scores_from_own_run
            ]  # fmt: skip
            for (at, place), name in itertools.product(zip(PLACES, (None, weights), strict=True), drawn):
                body = {"do": "gradients", "arms": [name], "weights": place, "seed": seed}
                requests.append(Request("gradients", {"at": at, "arm": name}, body))
        routed = [
            arm.name for arm in self.arms
            if arm.method != "standard" and arm.routing.gradient != "sequence" and not arm.scores_from_own_run
            and arm.routing.selection != SUPERVISED
        ]  # fmt: skip
        if routed:
            requests.append(Request("kept", {}, {"do": "kept", "arms": routed, "weights": weights, "seed": seed}))
        self._do(requests)

    def _has_whole_batches(self) -> bool:
        train = self.settings.train
        sequences = len(TokenStore.open(self.folder / "tokens").heldout) // train.length
        if sequences >= train.batch_size:
            return True
        self.console.print(
            f"gradients are not compared: the held-out text has {sequences} sequences of {train.length} tokens, fewer "
            "than "
            f"a batch of {train.batch_size}; give more text, shorter sequences or a smaller batch",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        return False

    def _report(self, plan: Plan) -> Outcome:
        from cggr_train.report.study_page import write_study_page
        from cggr_train.report.tables import comparison_tables
        from cggr_train.report.verdict import verdict

        records = [record for record in self.records if record.get("seed", self.seeds[0]) in self.seeds]
        outcome = analyse(self.arms, plan, records, seeds=self.settings.seeds, left_out=self.left_out)
        lines = verdict(outcome)
        page = self.folder / REPORT
        write_study_page(page, outcome=outcome, verdict=lines, settings=self.settings, study=self.records[0])
        for table in comparison_tables(outcome):
            self.console.print(table)
        for line in lines:
            self.console.print(line, highlight=False)
        where = f"report: {page.resolve()}\nrecords: {(self.folder / RESULTS).resolve()}"
        self.console.print(where, highlight=False, soft_wrap=True)
        return outcome


def changes(arm: Arm) -> dict[str, Any]:
    """What was found out about an arm since the study was planned, for the workers."""
    return {"micro_batch": arm.micro_batch, "checkpointing": arm.checkpointing, "learning_rate": arm.learning_rate}


def same_training(one: Arm, other: Arm) -> bool:
    """Whether two arms are one way of training."""
    alike = ("method", "batch_size", "routing", "micro_batch", "checkpointing")
    return all(getattr(one, name) == getattr(other, name) for name in alike)


def best_rates(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rate of each arm whose held-out loss was the lowest; none of an arm that diverged at all of them."""
    losses: dict[str, dict[float, float]] = {}
    for record in records:
        if record["event"] == "rate" and "diverged" not in record:
            losses.setdefault(record["arm"], {})[record["rate"]] = record["points"][-1]["heldout_loss"]
    return {name: min(found, key=found.__getitem__) for name, found in losses.items()}


def _read_records(folder: Path) -> list[dict[str, Any]]:
    try:
        records: list[Any] = read_log(folder / RESULTS)
    except OSError as error:
        raise InputError(f"{folder} holds no study that can be resumed ({error})") from error
    kinds = [record.get("event") if isinstance(record, dict) else None for record in records]
    if kinds[:1] != ["study"] or None in kinds:
        raise InputError(
            f"{folder / RESULTS} was changed after the study wrote it: the first record must be the study's own, and "
            "every "
            "line an object with an event; undo the change, or start another study"
        )
    return records


def _identity(event: str, fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """What no two records share; a request and the record it becomes are alike in it."""
    return (event, *(fields.get(name) for name in ("arm", "seed", "turn", "at", "rate")))
