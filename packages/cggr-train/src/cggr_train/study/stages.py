"""The stages of a study: fitting into memory, timing, learning rates, runs, gradients, and the report."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from cggr_train.busy import busy
from cggr_train.data import TokenStore
from cggr_train.display import mute
from cggr_train.errors import DivergedError, InputError, RunError
from cggr_train.interrupt import StopRequest
from cggr_train.log import JsonlLog, read_log
from cggr_train.study.analysis import Outcome, analyse, step_times
from cggr_train.study.arms import Arm, load_arms
from cggr_train.study.live import LiveTable
from cggr_train.study.plan import Plan, make_plan
from cggr_train.study.pool import Pool, Request
from cggr_train.study.requests import (
    fit_requests,
    gradient_requests,
    kept_requests,
    rate_requests,
    run_requests,
    timing_requests,
)
from cggr_train.study.settings import StudySettings

RESULTS, REPORT = "results.jsonl", "report.html"
OUT_OF_MEMORY = "out_of_memory"
"""Kind of record for a measurement that ran out of memory; ``during`` is the kind it would have been."""


COMPARED = ("fit", "timing", "rate", "run")
"""Measurements without which an arm cannot be compared."""


class StudyResult(NamedTuple):
    """How a study ended."""

    outcome: Outcome | None
    """None if it was stopped before its end."""
    exit_code: int
    """0 at the end; 129, 130 or 143 after a clean stop by a signal."""


class Stages:
    """A study in its folder, in its current state.

    Args:
        settings: Of the study.
        folder: Holds what :func:`cggr_train.study.run.prepare_study` wrote, and the records so far.
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
        if not self.weights.is_dir():  # later measurements need them, so that run is repeated
            whose = ("run", self.arms[0].name, first)
            self.records = [
                r for r in self.records
                if (r["event"], r.get("arm"), r.get("seed")) != whose or "diverged" in r
            ]  # fmt: skip

    def run(self, where: list[tuple[torch.device, int]]) -> StudyResult:
        """Measure whatever has no record yet, on these devices with this many threads each, and write the report."""
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
        """Run whatever has no record yet, and record it."""
        known = {_identity(record["event"], record) for record in self.records}
        failed = {(r["during"], r["arm"]) for r in self.records if r["event"] == OUT_OF_MEMORY}
        missing = [
            request for request in requests
            if _identity(request.event, request.fields) not in known
            and (request.event, request.fields.get("arm")) not in failed
        ]  # fmt: skip
        if not missing:
            return
        for request, result in self.pool.run(
            missing, on_progress=self.table.progress, stop=lambda: self.stop.requested, alone=alone
        ):
            if OUT_OF_MEMORY in result:
                self._note_out_of_memory(request, result[OUT_OF_MEMORY])
                continue
            record = {"event": request.event, **request.fields, **result}
            self.log.write(**record)
            self.records.append(record)
            self.table.take(record)
            self._check_standard(record)

    def _note_out_of_memory(self, request: Request, words: str) -> None:
        """The study continues without an arm that runs out of memory, unless it is the standard arm."""
        arm = next((arm for arm in self.arms if arm.name == request.fields.get("arm")), None)
        advice = "give --memory-limit, which finds a micro-batch that fits, or a smaller --batch-size or --length"
        if arm is not None and arm is self.arms[0] and request.event in COMPARED:
            raise RunError(f"{arm.label} ran out of memory ({words}), but every arm is compared with it; {advice}")
        if "seed" in request.fields and arm is not None:
            shutil.rmtree(self.folder / "runs" / f"{arm.name}-seed{request.fields['seed']}", ignore_errors=True)
        record = {"event": OUT_OF_MEMORY, "during": request.event, "arm": arm and arm.name, "reason": words}
        if any((r["event"], r.get("during"), r.get("arm")) == tuple(record.values())[:3] for r in self.records):
            return
        self.log.write(**record)
        self.records.append(record)
        self.table.take(record)
        if request.event in COMPARED:
            line = f"{arm and arm.title} ran out of memory ({words}); the study continues without it"
        else:
            line = f"out of memory while measuring {request.event} ({words}); the page omits them"
        self.console.print(line, highlight=False, soft_wrap=True)

    def _drop_out_of_memory(self, *during: str) -> None:
        """Drop the arms that ran out of memory in these measurements."""
        found = {r["arm"]: r["reason"] for r in self.records if r["event"] == OUT_OF_MEMORY and r["during"] in during}
        for arm in self.arms:
            if arm.name in found:
                self.left_out[arm.name] = f"{arm.title}: ran out of memory ({found[arm.name]})"
        if found:
            self._set_arms([arm for arm in self.arms if arm.name not in found])

    def _check_standard(self, record: Mapping[str, Any]) -> None:
        """Other arms may diverge and are reported as diverged; without this one there is nothing to compare with."""
        if record["event"] == "run" and record["arm"] == self.arms[0].name and "diverged" in record:
            raise DivergedError(
                f"{self.arms[0].label}, seed {record['seed']}: {record['reason']}. Every arm is compared with this "
                "one; start another study with a lower --learning-rate"
            )

    def _fit_and_time(self) -> None:
        """Find how much of each arm's batch fits at a time, if needed, and time its step."""
        limited = [arm for arm in self.arms if arm.memory_of is None]
        if self.settings.memory_limit is not None:
            self._fit(limited, dict.fromkeys((arm.name for arm in limited), self.settings.memory_limit))
            if self.stop.requested:
                return
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
        self.table.stage("finding how many sequences of each arm fit into memory at once")
        self._do(fit_requests(arms, limits), alone=True)

    def _take_fits(self) -> None:
        """Give each arm the sizes that fit; an arm that does not fit at all is left out and reported."""
        fits = {record["arm"]: record for record in self.records if record["event"] == "fit"}
        fitted: list[Arm] = []
        for arm in self.arms:
            found = fits.get(arm.name)
            if arm.memory_of in self.left_out:
                self.left_out[arm.name] = f"{arm.label}: the routed step that it is compared with was left out"
                continue
            if found is None:
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
                f"--memory-limit: not even one sequence of {arm.label} fits with checkpointing, but every arm is "
                "compared with it; give more memory or shorter sequences"
            )
        reason = "of the routed step" if arm.memory_of is not None else "that --memory-limit gives"
        self.left_out[arm.name] = f"{arm.label}: not even one sequence fits into the memory {reason}"
        self.console.print(f"left out: {self.left_out[arm.name]}", highlight=False, soft_wrap=True)

    def _set_arms(self, arms: Sequence[Arm]) -> None:
        """Set the arms to compare from now on; references to missing controls are dropped."""
        names = {arm.name for arm in arms}
        self.arms = [
            dataclasses.replace(
                arm,
                equal_cost=arm.equal_cost if arm.equal_cost in names else self.arms[0].name,
                random=arm.random if arm.random in names else None,
                own_precision=arm.own_precision if arm.own_precision in names else None,
            )
            for arm in arms
        ]
        self.table.show_arms(self.arms)

    def _time(self, arms: Sequence[Arm]) -> None:
        self.table.stage("timing every arm's step, alone on its device")
        self._do(timing_requests(self.settings, arms), alone=True)
        if not self.stop.requested:
            self._drop_out_of_memory("timing")

    def _tune(self, plan: Plan) -> None:
        """Give each arm its best learning rate."""
        if not self.settings.rates:
            return
        self.table.stage("trying learning rates")
        self._do(rate_requests(self.settings, self.arms, plan))
        if not self.stop.requested:
            self._drop_out_of_memory("rate")
            best = best_rates(self.records)
            self._set_arms([dataclasses.replace(arm, learning_rate=best.get(arm.name)) for arm in self.arms])

    def _train(self, plan: Plan) -> None:
        self.table.stage("training")
        for record in self.records:
            self._check_standard(record)
        self._do(run_requests(self.settings, self.arms, plan, self.seeds))
        if not self.stop.requested:
            self._drop_out_of_memory("run")

    def _compare_gradients(self) -> None:
        """Compare gradients at the start and end of the standard run, and the tokens each arm keeps at the end."""
        self.table.stage("comparing gradients and kept tokens")
        requests = []
        if self.settings.draws and self._has_whole_batches():
            requests += gradient_requests(self.arms, self.weights, self.seeds[0])
        self._do([*requests, *kept_requests(self.arms, self.weights, self.seeds[0])])

    def _has_whole_batches(self) -> bool:
        train = self.settings.train
        sequences = len(TokenStore.open(self.folder / "tokens").heldout) // train.length
        if sequences >= train.batch_size:
            return True
        self.console.print(
            f"gradients are not compared: the held-out text has {sequences} sequences of {train.length} tokens, fewer "
            f"than a batch of {train.batch_size}; give more text, shorter sequences or a smaller batch",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        return False

    def _report(self, plan: Plan) -> Outcome:
        with busy("writing the report", self.console):
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


def same_training(one: Arm, other: Arm) -> bool:
    """Whether two arms train in the same way."""
    alike = ("method", "batch_size", "routing", "micro_batch", "checkpointing")
    return all(getattr(one, name) == getattr(other, name) for name in alike)


def best_rates(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The learning rate with the lowest held-out loss for each arm; none for an arm that diverged at all of them."""
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
            f"{folder / RESULTS} was changed after the study wrote it: the first record must be the study's own and "
            "every line a JSON object with an event; undo the change or start another study"
        )
    return records


def _identity(event: str, fields: Mapping[str, Any]) -> tuple[Any, ...]:
    """The identity of a record, shared with the request that produces it."""
    return (event, *(fields.get(name) for name in ("arm", "seed", "turn", "at", "rate")))
