"""The coordinator of `benchmarks.frontier`: times steps, hands runs and questions to processes, and keeps records."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks._frontier_plan import Plan, setting_of, time_of, with_arms
from benchmarks._frontier_report import report, whole_seeds
from cggr_train.log import JsonlLog, read_log

TUNING_SEED = 1000
TUNING_SHARE = 0.5
"""Time for which a rate is tried, as a share of a run's."""
REPORT_SECONDS = 12.0
"""Seconds held in reserve."""
WRITE_EVERY = 15.0
"""Seconds between results, so that there is one if the machine is lost."""
ROOM = 14e9
"""Bytes of a run's step, so that several runs share a GPU."""


class Study:
    """The coordinator.

    Args:
        arguments: Of the command line.
        told: The settings sent to every worker.
        noted: Further settings for the result.
        log: File of the records.
    """

    def __init__(self, arguments: argparse.Namespace, told: dict[str, Any], noted: dict[str, Any], log: Path) -> None:
        self.arguments, self.told, self.noted = arguments, told, noted
        self.setting = setting_of(arguments)
        self.records: list[Any] = read_log(log) if log.exists() else []
        self.log = JsonlLog(log)
        self.ends = time.monotonic() + arguments.seconds - REPORT_SECONDS
        self.began = time.monotonic()
        self.written = self.began
        self.plan: Plan | None = None
        self.context = multiprocessing.get_context("spawn")
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.doing: dict[Connection, dict[str, Any]] = {}
        self.walls: list[float] = []
        self.failed: list[dict[str, Any]] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def say(self, text: str) -> None:
        """Print with the elapsed seconds."""
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    def write(self) -> None:
        """Write the result so far, if all arms have finished a seed."""
        self.written = time.monotonic()
        if self.plan is not None and whole_seeds(self.setting, self.records):
            path = report(self.arguments, self.noted, self.plan, self.records)
            self.say(f"result {path}")

    def start(self) -> Connection:
        """A worker."""
        from benchmarks._frontier_worker import serve

        own, its = self.context.Pipe()
        process = self.context.Process(target=serve, args=(its, self.told), daemon=True)
        process.start()
        its.close()
        self.processes.append(process)
        self.pipes.append(own)
        return own

    def known(self, event: str, **fields: Any) -> Any:
        """The record of these fields, or None."""
        return next(
            (r for r in self.records if r["event"] == event and all(r.get(k) == v for k, v in fields.items())), None
        )

    def give(
        self, pipe: Connection, event: str, fields: dict[str, Any], body: dict[str, Any], *, again: bool = False
    ) -> None:
        """Hand a task to a worker."""
        noted = {"rate": body["rate"]} if event == "run" else {}
        self.doing[pipe] = {"event": event, "fields": fields, "noted": noted, "again": again, "began": time.monotonic()}
        pipe.send(body)

    def results(self, timeout: float) -> Iterator[tuple[Connection, dict[str, Any]]]:
        """The results of workers since the last call."""
        ready: list[Any] = wait(list(self.doing), timeout=timeout)
        for pipe in ready:
            task = self.doing.pop(pipe)
            try:
                result = pipe.recv()
            except (EOFError, OSError):
                result, pipe_ended = {"error": "its process ended"}, True
            else:
                pipe_ended = False
            wall = time.monotonic() - task["began"]
            record = {"event": task["event"], **task["fields"], **task["noted"], **result, "wall": round(wall, 2)}
            if "error" in result:
                self.say(f"{task['event']} {task['fields']}: {result['error']}")
                if task["event"] in ("rate", "run") and not task["again"]:
                    self.failed.append({"event": task["event"], "fields": task["fields"], "again": True})
                elif task["event"] == "rate":
                    self.records.append({**record, "points": [], "diverged": 0})
                elif task["event"] == "run":
                    self.records.append({**record, "event": "failed"})
            else:
                self.log.write(**record)
                self.records.append(record)
                self.say(_line(record))
            if pipe_ended:
                self.free = [other for other in self.free if other is not pipe]
                record["lost"] = True
            yield pipe, record

    def run(self) -> None:
        """Run everything, as far as time allows."""
        workers = [self.start() for _ in range(self.arguments.parallel)]
        answering = self.start() if self.arguments.questions else None
        self.free: list[Connection] = []
        try:
            self._time(workers[0])
            if self.plan is not None:
                self._train(workers, answering)
        finally:
            for pipe in self.pipes:
                pipe.close()  # ends waiting workers
            for process in self.processes:
                process.join(1.0)
                process.kill()
                process.join()

    def _time(self, worker: Connection) -> None:
        """Time steps in a separate process, while a worker that needs no GPU reads the weights."""
        self.give(worker, "weights", {}, {"do": "weights"})
        waiting = [name for name in self.setting.arms if self.known("timing", arm=name) is None]
        timer = self.start() if waiting else None
        ready = self.told["config"] is not None  # otherwise the model being written would be timed
        while (waiting or self.doing) and self.left > 0:
            if ready and waiting and timer is not None and timer not in self.doing:
                name = waiting.pop(0)
                body = {"do": "time", "arm": name, "itself": not self.arguments.as_recorded}
                self.give(timer, "timing", {"arm": name}, body)
            for _, record in self.results(1.0):
                if record["event"] == "timing" and time_of(record, "eager") is None:
                    self._leave_out(record["arm"])
                if record["event"] == "timing" and ("error" in record or "CUDA error" in str(record)):
                    self.processes[-1].kill()  # nothing runs in it anymore
                    timer = self.start()
                ready = ready or record["event"] == "weights"
                if record["event"] == "weights" and "error" in record:
                    raise SystemExit("the model cannot be loaded")
        if timer is not None:
            self.processes[-1].kill()  # frees its GPU memory
        timings = {name: self.known("timing", arm=name) for name in self.setting.arms}
        if None not in timings.values():
            self.plan = Plan(
                self.setting, timings, seconds=self.arguments.time, steps=self.arguments.steps,
                answers=self.arguments.answers,
            )  # fmt: skip
            self.say(f"every arm gets {self.plan.budget:.1f} s: {self.plan.steps}, usual: {self.plan.usual_steps}")

    def _leave_out(self, arm: str) -> None:
        """Continue without an arm that has no step, and without its way if no other arm uses it."""
        if arm in (self.setting.clock, next(iter(self.setting.arms))):
            raise SystemExit(f"{arm} has no step, and every other arm is compared with it")
        self.setting = with_arms(self.setting, [name for name in self.setting.arms if name != arm])

    def _train(self, workers: list[Connection], answering: Connection | None) -> None:
        waiting = [*self._trials(), *self._runs()]
        self.free = list(workers)
        answers = self._answers() if self.arguments.questions else []
        answers = [task for task in answers if self.known("answers", **task["fields"]) is None]
        while self.left > 0:
            for pipe in [*self.free]:
                task = self._next(waiting)
                if task is not None:
                    self.free.remove(pipe)
                    self.give(pipe, task["event"], task["fields"], self._body(task), again="again" in task)
                elif answers:
                    self.free.remove(pipe)
                    self._ask(pipe, answers)
            if answering is not None and answering not in self.doing and answers:
                self._ask(answering, answers)
            if not (self.doing or self.failed):
                break
            found = list(self.results(0.5))
            while self.failed:  # another run may have used up the memory
                waiting.insert(0, self.failed.pop())
            for pipe, record in found:
                if pipe is answering:
                    answering = None if "lost" in record else answering
                elif "lost" not in record:
                    self.free.append(pipe)
                if record["event"] == "run" and "error" not in record:
                    self.walls.append(record["wall"])
                    answers += self._answers_of(record)
            if found and time.monotonic() - self.written > WRITE_EVERY:
                self.write()
        for task in self.doing.values():
            self.say(f"out of time: {task['event']} {task['fields']}")

    def _ask(self, pipe: Connection, answers: list[dict[str, Any]]) -> None:
        task = answers.pop(0)
        self.give(pipe, "answers", task["fields"], {"do": "answer", "path": task["path"]})

    def _next(self, waiting: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self.walls and self.left < 0.9 * min(self.walls):
            return None
        for task in waiting:
            if task["event"] == "rate" or self._rate(task["fields"]["way"]) is not None:
                waiting.remove(task)
                return task
        return None

    def _trials(self) -> list[dict[str, Any]]:
        found = []
        for name, way in self.setting.ways.items():
            if way.rate_of is None and len(self._rates(name)) > 1:
                found += [{"event": "rate", "fields": {"way": name, "rate": rate}} for rate in self._rates(name)]
        return [task for task in found if self.known("rate", **task["fields"]) is None]

    def _rates(self, way: str) -> tuple[float, ...]:
        return tuple(self.arguments.rates or self.setting.ways[way].rates)

    def _rate(self, way: str) -> float | None:
        """The best rate; None while trials are unfinished."""
        whose = self.setting.ways[way].rate_of or way
        if whose not in self.setting.ways:  # it was dropped
            return self._rates(way)[0]
        rates = self._rates(whose)
        if len(rates) == 1:
            return rates[0]
        tried = [self.known("rate", way=whose, rate=rate) for rate in rates]
        if None in tried:
            return None
        losses = {r["rate"]: r["points"][-1]["loss"] for r in tried if r["points"] and "diverged" not in r}
        return min(losses, key=losses.__getitem__) if losses else min(rates)

    def _runs(self) -> list[dict[str, Any]]:
        early = [name for name, way in self.setting.ways.items() if not way.late]
        late = [name for name, way in self.setting.ways.items() if way.late]
        found = [
            {"event": "run", "fields": {"way": name, "seed": seed}}
            for names in (early, late)
            for seed in range(self.arguments.seeds)
            for name in names
        ]
        return [task for task in found if self.known("run", **task["fields"]) is None]

    def _body(self, task: dict[str, Any]) -> dict[str, Any]:
        assert self.plan is not None
        name = task["fields"]["way"]
        points = self.plan.points[name]
        body = {"do": "train", "way": name, "eval_rows": self.arguments.eval_rows, **self._fit(name)}
        if task["event"] == "rate":
            points = [max(1, round(TUNING_SHARE * points[-1]))]
            return {**body, "rate": task["fields"]["rate"], "points": points, "seed": TUNING_SEED, "tuning": True}
        seed = task["fields"]["seed"]
        keep = {}
        if self.arguments.questions and self.setting.ways[name].answers:
            keep = {step: str(self._saved(name, seed, step)) for step in self.plan.answered_at(name).values()}
        return {**body, "rate": self._rate(name), "points": points, "seed": seed, "keep": keep}

    def _fit(self, way: str) -> dict[str, Any]:
        """The arm that takes a way's steps: the fastest one within :data:`ROOM`, or the smallest."""
        found = []
        for name, arm in self.setting.arms.items():
            timing = self.known("timing", arm=name)
            recorded = time_of(timing, "recorded") is not None
            took = timing["recorded" if recorded else "eager"]
            if arm.way == way:
                found.append((max(took.get("peak_bytes", 0), ROOM), took["seconds"], name, recorded))
        _, _, name, recorded = min(found)
        arm = self.setting.arms[name]
        return {"recorded": recorded, "micro_batch": arm.micro_batch, "checkpointing": arm.checkpointing}

    def _saved(self, way: str, seed: int, step: int) -> Path:
        return Path(self.told["weights"]).parent / f"{self.arguments.setting}-{way}-seed{seed}-step{step}.pt"

    def _answers(self) -> list[dict[str, Any]]:
        """Questions for the untrained model, and for earlier runs without answers."""
        found = [{"fields": {"way": "before", "seed": 0, "step": 0}, "path": None}]
        for record in self.records:
            if record["event"] == "run":
                found += self._answers_of(record)
        return found

    def _answers_of(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        assert self.plan is not None
        way, seed = record["way"], record["seed"]
        steps = sorted(set(self.plan.answered_at(way).values()), reverse=True)
        return [
            {"fields": {"way": way, "seed": seed, "step": step}, "path": str(self._saved(way, seed, step))}
            for step in steps
            if self._saved(way, seed, step).exists()
        ]


def _line(record: dict[str, Any]) -> str:
    match record["event"]:
        case "timing":
            kinds = {kind: record[kind] for kind in ("eager", "recorded", "itself") if kind in record}
            told = [
                f"{kind} {found['seconds'] * 1e3:.1f} ms, {found.get('peak_bytes', 0) / 1e9:.1f} GB"
                if "seconds" in found else f"{kind}: {found.get('reason')}"
                for kind, found in kinds.items()
            ]  # fmt: skip
            return f"{record['arm']}: {'; '.join(told)} ({record['wall']} s)"
        case "answers":
            right, asked = len(record["right"]), record["questions"]
            which = f"{record['way']}, seed {record['seed']}, step {record['step']}"
            return f"{which}: {right} of {asked} right ({record['wall']} s)"
        case "weights":
            return f"the weights are ready ({record['wall']} s)"
        case kind:
            what = f"rate {record['rate']:g}" if kind == "rate" else f"seed {record['seed']}"
            curve = " ".join(f"{point['step']}: {point['loss']:.4f}" for point in record["points"])
            end = f" diverged at {record['diverged']}" if "diverged" in record else ""
            return f"{record['way']}, {what}: {curve}{end} ({record['wall']} s)"
