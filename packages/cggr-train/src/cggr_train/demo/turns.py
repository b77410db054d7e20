"""The four runs, each in a process of its own on one core, training in turns."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from cggr_train.demo.worker import RunSpec
from cggr_train.display import bar, numbers
from cggr_train.errors import RunError

NUMBERS = ("step", "loss", "keep_ratio", "tokens_per_second", "memory")


def run_in_turns(
    specs: Sequence[RunSpec], labels: Mapping[str, str], folder: Path, console: Console
) -> list[dict[str, Any]]:
    """Run every specification in a fresh process; as many train at a time as there are cores.

    Every process has one thread: small matrices gain little from a second one, and lose much where it has to wait
    for a core. Taking turns, rather than one run after the other, spreads over all of them whatever else the machine
    is doing.

    Args:
        specs: The runs.
        labels: Their names for people.
        folder: For files that are gone afterwards.
        console: Where the bars are shown.

    Returns:
        The figures of each run, in the order of ``specs``; see :func:`cggr_train.demo.worker.run`.

    Raises:
        RunError: If a run fails, with the last line it printed.
    """
    workers = [_Worker(spec, folder) for spec in specs]
    try:
        for worker in workers:
            worker.until_turn()
        with bar(console) as progress, ThreadPoolExecutor(min(_cores(), len(workers))) as pool:
            waiting: queue.SimpleQueue[tuple[_Worker, TaskID]] = queue.SimpleQueue()
            for worker, spec in zip(workers, specs, strict=True):
                waiting.put((worker, progress.add_task(labels[spec.name], total=1.0, start=False, numbers="")))
            turns = [pool.submit(_serve, waiting, progress) for _ in range(min(_cores(), len(workers)))]
            try:
                for turn in as_completed(turns):
                    turn.result()
            except BaseException:
                for worker in workers:
                    worker.end()  # so that the threads that read from them come to an end
                raise
        return [worker.result() for worker in workers]
    finally:
        for worker in workers:
            worker.end()


def _serve(waiting: queue.SimpleQueue[tuple[_Worker, TaskID]], progress: Progress) -> None:
    """Give turns, one at a time, until no run is waiting for one."""
    while True:
        try:
            worker, task = waiting.get_nowait()
        except queue.Empty:
            return  # those that are not over yet are in other threads' hands
        progress.start_task(task)
        worker.give_turn()
        while (record := worker.read())["event"] == "step":
            text = numbers(**{name: record[name] for name in NUMBERS})
            progress.update(task, completed=min(1.0, record["spent"]), numbers=text)
        if record["event"] == "turn":
            waiting.put((worker, task))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Worker:
    def __init__(self, spec: RunSpec, folder: Path) -> None:
        self.name = spec.name
        self.failed = False
        self.spec_path = folder / f"{spec.name}.json"
        self.result_path = self.spec_path.with_suffix(".result.json")
        self.error_path = folder / f"{spec.name}.errors.txt"
        self.result_path.unlink(missing_ok=True)
        self.spec_path.write_text(spec.to_json(), encoding="utf-8")
        with self.error_path.open("w", encoding="utf-8") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cggr_train.demo.worker", str(self.spec_path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def until_turn(self) -> None:
        while self.read()["event"] != "turn":
            pass

    def give_turn(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def read(self) -> dict[str, Any]:
        """The next record; ``{"event": "end"}`` when the run is over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        if self.process.wait() != 0:
            self.failed = True
            last = self.error_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise RunError(f"the run {self.name!r} failed: {' '.join(last)} (see {self.error_path})")
        return {"event": "end"}

    def result(self) -> dict[str, Any]:
        return json.loads(self.result_path.read_text(encoding="utf-8"))

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        for path in (self.spec_path, self.result_path, *([] if self.failed else [self.error_path])):
            path.unlink(missing_ok=True)
