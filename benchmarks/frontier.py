"""What someone who fine-tunes a pretrained model weighs: seconds, gigabytes, and what the model can do afterwards.

Every arm of a setting trains the same model on GSM8K for the same time, and is read by its held-out loss and by how
many test problems it then answers. Steps are timed first, with nothing else on the GPU, each of them as it is, recorded
as one CUDA graph, and as ``CGGRModel`` records it by itself; an arm then takes as many steps as the time buys, so that
what else runs meanwhile does not matter. Arms that compute the same (checkpointed, or fewer sequences at a time) are
read off one run.

``context``   a question behind others, 2,048 tokens, of which 6% are supervised
``answers``   a question and its answer, which alone is supervised: one and three epochs
``context-parts``, ``answers-parts``
              half of the supervised tokens by what is kept together, and routing in half of the layers, over fewer
              rows in more epochs
``batches``   the standard step at batch 1 and at batch 4 against routed steps at batch 4
``toy``       a few steps, to try the benchmark on a CPU

Learning rates are tried on rows of their own. A run that was stopped goes on when the same command is given again; at
the end of ``--seconds`` it reports on the seeds that all arms have done.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import time
from collections.abc import Collection, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from benchmarks import _record
from benchmarks._frontier_arms import SETTINGS, Setting
from benchmarks._frontier_data import load, prepare
from benchmarks._frontier_report import report, whole_seeds
from cggr_train.log import JsonlLog, read_log

TUNING_SEED = 1000
TUNING_SHARE = 0.5
"""How long a rate is tried, as a share of the time of a run."""
REPORT_SECONDS = 12.0
"""Kept back of the time."""
ROOM = 14e9
"""Bytes of a run's step, so that several runs share a GPU."""
CURVE = (1 / 8, 1 / 4, 1 / 2)
"""Where a curve is read besides, as shares of its steps."""


def steps_at(setting: Setting, times: dict[str, float], budget: float, share: float) -> dict[str, int]:
    """Steps of each arm after a share of the time that all get."""
    return {name: max(1, round(share * budget / times[name])) for name in setting.arms}


def with_arms(setting: Setting, names: Collection[str]) -> Setting:
    """The setting with some of its arms alone, and the ways that these have."""
    arms = {name: arm for name, arm in setting.arms.items() if name in names}
    left = {arm.way for arm in arms.values()}
    ways = {name: way for name, way in setting.ways.items() if name in left}
    return dataclasses.replace(setting, arms=arms, ways=ways)


def setting_of(arguments: argparse.Namespace) -> Setting:
    """What the command line asks for."""
    setting = SETTINGS[arguments.setting]
    if arguments.only:
        if unknown := sorted(set(arguments.only) - set(setting.ways)):
            raise SystemExit(f"--only takes ways of {arguments.setting}: {', '.join(setting.ways)}; not {unknown}")
        setting = with_arms(setting, [name for name, arm in setting.arms.items() if arm.way in arguments.only])
    return setting


def time_of(record: dict[str, Any], kind: str) -> float | None:
    """Seconds of a step, where there are such."""
    return record.get(kind, {}).get("seconds")


class Plan:
    """How many steps every arm takes, from their times.

    Args:
        setting: The setting.
        timings: Records of :func:`benchmarks._frontier_training.time_arm`, by arm.
        seconds: Of every run, instead of the setting's.
        steps: Of the clock arm, instead of the setting's.
        answers: Which readings test problems are answered at, ``"all"`` or ``"equal"``: after equal examples alone.

    Attributes:
        times: Of a recorded step where it could be recorded.
        usual: Of a step as it runs by default: the standard one as it is, a routed one as ``CGGRModel`` takes it.
        budget: Seconds that every arm gets.
        steps: By share of the budget, then by arm.
        equal: By arm, the steps after which all arms have seen as many examples.
        points: By way.
    """

    def __init__(
        self, setting: Setting, timings: dict[str, Any], *, seconds: float | None = None, steps: int | None = None,
        answers: str = "all",
    ) -> None:  # fmt: skip
        self.setting, self.answers = setting, answers
        self.times, self.usual = {}, {}
        for name in setting.arms:
            found = timings[name]
            eager = time_of(found, "eager")
            self.times[name] = time_of(found, "recorded") or eager
            routed = setting.ways[setting.arms[name].way].gradient != "exact"
            self.usual[name] = min(filter(None, (eager, time_of(found, "itself")))) if routed else eager
        for name, arm in setting.arms.items():
            if arm.counted:
                for times in (self.times, self.usual):
                    times[name] = sum(share * times[other] for other, share in arm.counted)
        clock = self.times[setting.clock]
        count = steps or setting.steps
        if seconds is None and count is not None:
            self.budget = count * clock
        else:
            self.budget = seconds or setting.seconds or 0.0
        self.steps = {share: steps_at(setting, self.times, self.budget, share) for share in setting.shares}
        self.usual_steps = {share: steps_at(setting, self.usual, self.budget, share) for share in setting.shares}
        batches = {name: setting.ways[arm.way].batch for name, arm in setting.arms.items()}
        last = self.steps[setting.shares[-1]]
        examples = min(last[name] * batches[name] for name in setting.arms)
        self.equal = {name: max(1, examples // batches[name]) for name in setting.arms}
        self.points = {way: self._points(way) for way in setting.ways}

    def _points(self, way: str) -> list[int]:
        arms = [name for name, arm in self.setting.arms.items() if arm.way == way]
        read = {self.equal[name] for name in arms}
        for by_share in (self.steps, self.usual_steps):
            read |= {steps[name] for steps in by_share.values() for name in arms}
        last = self.setting.shares[-1]
        most = max(max(self.steps[last][name], self.usual_steps[last][name]) for name in arms)
        spread = {max(1, round(most * share)) for share in CURVE}
        spread = {point for point in spread if all(abs(point - other) > 0.2 * other for other in read)}
        return sorted(point for point in read | spread if point <= most)

    def answered_at(self, way: str) -> dict[str, int]:
        """After which steps a way answers test problems, by the name of the reading."""
        found = {}
        for name, arm in self.setting.arms.items():
            # Of the arms that are read off the clock's run, this one alone.
            if arm.way == way and (name == self.setting.clock or way != self.setting.arms[self.setting.clock].way):
                if self.answers == "all":
                    found |= {f"{name}, {share:.2f}": steps[name] for share, steps in self.steps.items()}
                found[f"{name}, equal examples"] = self.equal[name]
        return found


class Study:
    """The coordinator.

    Args:
        arguments: Of the command line.
        told: What every worker is told.
        noted: What the result says besides.
        log: Where records go.
    """

    def __init__(self, arguments: argparse.Namespace, told: dict[str, Any], noted: dict[str, Any], log: Path) -> None:
        self.arguments, self.told, self.noted = arguments, told, noted
        self.setting = setting_of(arguments)
        self.records: list[Any] = read_log(log) if log.exists() else []
        self.log = JsonlLog(log)
        self.ends = time.monotonic() + arguments.seconds - REPORT_SECONDS
        self.began = time.monotonic()
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
        """Print with the seconds that have gone."""
        print(f"[{time.monotonic() - self.began:5.0f} s] {text}", flush=True)

    def write(self) -> None:
        """The result so far, where all arms have done a seed."""
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
        """What workers have done since."""
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
        """Everything, as far as the time goes."""
        workers = [self.start() for _ in range(self.arguments.parallel)]
        answering = self.start() if self.arguments.questions else None
        self.free: list[Connection] = []
        try:
            self._time(workers[0])
            if self.plan is not None:
                self._train(workers, answering)
        finally:
            for pipe in self.pipes:
                pipe.close()  # which ends those that wait
            for process in self.processes:
                process.join(1.0)
                process.kill()
                process.join()

    def _time(self, worker: Connection) -> None:
        """Steps in a process of their own, which ends with them; meanwhile a worker that needs no GPU reads weights."""
        self.give(worker, "weights", {}, {"do": "weights"})
        waiting = [name for name in self.setting.arms if self.known("timing", arm=name) is None]
        timer = self.start() if waiting else None
        ready = self.told["config"] is not None  # else the model is timed that is being written
        while (waiting or self.doing) and self.left > 0:
            if ready and waiting and timer is not None and timer not in self.doing:
                name = waiting.pop(0)
                body = {"do": "time", "arm": name, "itself": not self.arguments.as_recorded}
                self.give(timer, "timing", {"arm": name}, body)
            for _, record in self.results(1.0):
                if record["event"] == "timing" and time_of(record, "eager") is None:
                    self._leave_out(record["arm"])
                if record["event"] == "timing" and ("error" in record or "CUDA error" in str(record)):
                    self.processes[-1].kill()  # nothing runs in it any more
                    timer = self.start()
                ready = ready or record["event"] == "weights"
                if record["event"] == "weights" and "error" in record:
                    raise SystemExit("the model cannot be loaded")
        if timer is not None:
            self.processes[-1].kill()  # with the memory of its GPU
        timings = {name: self.known("timing", arm=name) for name in self.setting.arms}
        if None not in timings.values():
            self.plan = Plan(
                self.setting, timings, seconds=self.arguments.time, steps=self.arguments.steps,
                answers=self.arguments.answers,
            )  # fmt: skip
            self.say(f"every arm gets {self.plan.budget:.1f} s: {self.plan.steps}, usual: {self.plan.usual_steps}")

    def _leave_out(self, arm: str) -> None:
        """Go on without an arm that has no step, and without its way where no other arm has it."""
        if arm in (self.setting.clock, next(iter(self.setting.arms))):
            raise SystemExit(f"{arm} has no step, and every other arm is compared with it")
        self.setting = with_arms(self.setting, [name for name in self.setting.arms if name != arm])

    def _train(self, workers: list[Connection], answering: Connection | None) -> None:
        waiting = [*self._trials(), *self._runs()]
        self.free = list(workers)
        answers = [task for task in self._answers() if self.known("answers", **task["fields"]) is None]
        written = len(whole_seeds(self.setting, self.records))
        while self.left > 0:
            for pipe in list(self.free):
                task = self._next(waiting)
                if task is None:
                    break
                self.free.remove(pipe)
                self.give(pipe, task["event"], task["fields"], self._body(task), again="again" in task)
            if answering is not None and answering not in self.doing and answers:
                task = answers.pop(0)
                self.give(answering, "answers", task["fields"], {"do": "answer", "path": task["path"]})
            if not (self.doing or self.failed):
                break
            found = list(self.results(0.5))
            while self.failed:  # memory may have run out beside another run
                waiting.insert(0, self.failed.pop())
            for pipe, record in found:
                if pipe is answering:
                    answering = None if "lost" in record else answering
                elif "lost" not in record:
                    self.free.append(pipe)
                if record["event"] == "run" and "error" not in record:
                    self.walls.append(record["wall"])
                    answers += self._answers_of(record)
                    if (whole := len(whole_seeds(self.setting, self.records))) > written:
                        written = whole  # what there is, should the machine go away
                        self.write()
        for task in self.doing.values():
            self.say(f"out of time: {task['event']} {task['fields']}")

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
        """The best of those tried; None while trials are out."""
        whose = self.setting.ways[way].rate_of or way
        if whose not in self.setting.ways:  # it was left out
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
        """How its runs take their steps: the fastest arm that computes it within :data:`ROOM`, or the smallest."""
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
        """Of the model before training, and of earlier runs that have not been answered yet."""
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


def main() -> None:
    """Run or resume one setting, and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=sorted(SETTINGS))
    parser.add_argument("--model", type=Path, required=True, help="folder of the pretrained model, or of its GGUF file")
    parser.add_argument("--tokenizer", type=Path, help="folder of its tokenizer; without it the model's")
    parser.add_argument("--config", type=Path, help="its config.json: steps are timed while a GGUF file is read")
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl and test.jsonl, to make --rows of")
    parser.add_argument("--rows", type=Path, required=True, help="the tokenized problems; made where it is missing")
    parser.add_argument("--work", type=Path, required=True, help="of the weights")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="records; goes on with what is there")
    parser.add_argument("--name", help="of the result, instead of frontier_SETTING_MODEL")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="of the setting; the standard one among them")
    parser.add_argument("--time", type=float, help="seconds that every arm gets, instead of the setting's")
    parser.add_argument("--steps", type=int, help="of the arm that sets the time, instead of --time")
    parser.add_argument("--rates", type=float, nargs="+", help="to try, of every arm; one: it is not tried")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=3, help="runs at a time")
    parser.add_argument("--questions", type=int, default=330, help="test problems to answer; 0: none")
    parser.add_argument("--answers", choices=("all", "equal"), default="all", help="equal: after equal examples alone")
    parser.add_argument("--as-recorded", action="store_true", help="time no steps that CGGRModel records by itself")
    parser.add_argument("--questions-at-a-time", type=int, default=330)
    parser.add_argument("--eval-rows", type=int, default=96)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which everything is at an end")
    arguments = parser.parse_args()
    tokenizer = arguments.tokenizer or arguments.model
    setting = setting_of(arguments)
    if not arguments.rows.exists():
        from cggr_train.tokenizer import load_tokenizer

        if arguments.gsm8k is None:
            parser.error(f"{arguments.rows} is not there; give --gsm8k to make it of")
        prepare(arguments.rows, setting, arguments.gsm8k, load_tokenizer(str(tokenizer)))
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = arguments.model.name.lower().replace("-", "_")
    arguments.name = arguments.name or f"frontier_{arguments.setting}_{model}"
    told = {
        "setting": arguments.setting, "rows": str(arguments.rows), "model": str(arguments.model),
        "weights": str(arguments.work / f"model_{model}"), "tokenizer": str(tokenizer),
        "config": None if arguments.config is None else str(arguments.config), "device": arguments.device,
        "questions": arguments.questions, "questions_at_a_time": arguments.questions_at_a_time,
        "threads": max(1, torch.get_num_threads() // (arguments.parallel + 1)),
    }  # fmt: skip
    noted = {
        "model": arguments.model.name, "parallel": arguments.parallel, "ways": list(setting.ways),
        "rates": arguments.rates, "answers": arguments.answers, **load(arguments.rows, limit=setting.limit)[1],
    }  # fmt: skip
    study = Study(arguments, told, noted, arguments.output / f"{arguments.name}.jsonl")
    study.run()
    study.write()


if __name__ == "__main__":
    main()
