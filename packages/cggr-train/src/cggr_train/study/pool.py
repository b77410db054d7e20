"""The worker processes of a study: some on each device, each given the next piece of work when it is free."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from cggr_train.device import pick_device
from cggr_train.errors import InputError, RunError

KILLED = -9
"""Exit status of a process killed by SIGKILL, which leaves no message."""


@dataclass(frozen=True)
class Request:
    """One piece of work for a worker.

    Attributes:
        event: Kind of record for its result.
        fields: Fields that identify the record among others of its kind.
        body: What the worker reads, see :mod:`cggr_train.study.worker`.
    """

    event: str
    fields: dict[str, Any]
    body: dict[str, Any]


def places(device: str, parallel: int | None) -> list[tuple[torch.device, int]]:
    """Where workers run: a device and a number of CPU threads for each.

    Args:
        device: As for ``cggr train``; ``auto`` means every accelerator of the machine, else the CPU.
        parallel: Workers on each device; None is one on an accelerator and one per core on a CPU.

    Raises:
        InputError: If there is no such device.
    """
    first = pick_device(device)
    if first.type == "cpu":
        count = parallel or cores()
        return [(first, _threads(count))] * count
    devices = [first]
    if device == "auto":
        devices = [torch.device(first.type, number) for number in range(torch.accelerator.device_count())]
    workers = [found for _ in range(parallel or 1) for found in devices]
    return [(found, _threads(len(workers))) for found in workers]


def _threads(workers: int) -> int:
    """Each worker's share of the threads that torch would use here (limited by ``OMP_NUM_THREADS``)."""
    return max(1, torch.get_num_threads() // workers)


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Pool:
    """Workers, started when first needed.

    Args:
        folder: The study's folder.
        where: Device and threads of each worker.
    """

    def __init__(self, folder: Path, where: Sequence[tuple[torch.device, int]]) -> None:
        self.folder = folder
        self._workers = [Worker(folder, number, device, threads) for number, (device, threads) in enumerate(where)]

    def __enter__(self) -> Pool:
        """Return the pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every worker."""
        for worker in self._workers:
            worker.end()

    def run(
        self,
        requests: Sequence[Request],
        *,
        on_progress: Callable[[Request, dict[str, Any]], None] = lambda request, values: None,
        stop: Callable[[], bool] = lambda: False,
        alone: bool = False,
    ) -> Iterator[tuple[Request, Any]]:
        """Distribute requests and yield each with its result, in the order in which they finish.

        Args:
            requests: Work to do, in this order.
            on_progress: Called with a request and a progress message of its worker.
            stop: Once it returns true, no more requests are sent, and workers are asked to save and stop.
            alone: One request at a time on each device, for timing.

        Raises:
            InputError: If a worker found something that the user can fix.
            RunError: If a worker failed, with its last output.
        """
        waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        events: queue.SimpleQueue[tuple[Request | None, dict[str, Any]]] = queue.SimpleQueue()
        for request in requests:
            waiting.put(request)
        one_each = list({worker.device: worker for worker in reversed(self._workers)}.values())[::-1]
        workers = (one_each if alone else self._workers)[: max(1, len(requests))]
        for worker in self._workers:
            if worker.device.type != "cpu":  # starting a worker there would disturb the timing
                worker.start()
        threads = [
            threading.Thread(target=_serve_requests, args=(worker, waiting, events), daemon=True) for worker in workers
        ]
        for thread in threads:
            thread.start()
        running, stopping = len(threads), False
        try:
            while running:
                try:
                    request, event = events.get(timeout=0.2)
                except queue.Empty:
                    event = request = None
                if stop() and not stopping:
                    stopping = True
                    _empty(waiting)
                    for worker in workers:
                        worker.ask_to_stop()
                if event is None:
                    continue
                if request is None:
                    running -= 1
                elif event["event"] == "progress":
                    on_progress(request, event)
                elif event["event"] == "result":
                    yield request, event["result"]
                elif event["event"] == "error":
                    raise (InputError if event["kind"] == "input" else RunError)(event["message"])
        finally:
            _empty(waiting)  # after an error nothing more is sent


def _empty(waiting: queue.SimpleQueue[Request]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            waiting.get_nowait()


def _serve_requests(
    worker: Worker,
    waiting: queue.SimpleQueue[Request],
    events: queue.SimpleQueue[tuple[Request | None, dict[str, Any]]],
) -> None:
    while True:
        try:
            request = waiting.get_nowait()
        except queue.Empty:
            break
        for event in worker.ask(request.body):
            events.put((request, event))
            if event["event"] == "error":
                return  # the whole study ends with it
    events.put((None, {}))


class Worker:
    """One process, see :mod:`cggr_train.study.worker`."""

    def __init__(self, folder: Path, number: int, device: torch.device, threads: int) -> None:
        self.device = device
        self.errors = folder / f"worker-{number}.errors.txt"
        self._command = [
            sys.executable, "-m", "cggr_train.study.worker", str(folder), str(device), str(threads), str(os.getpid()),
        ]  # fmt: skip
        self._threads = threads
        self._process: subprocess.Popen[str] | None = None

    def ask(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send a request; yield its messages until it is done. A process that fails reports an error."""
        process = self.start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(body) + "\n")
            process.stdin.flush()
        except OSError:  # it exited; its output says why
            pass
        for line in process.stdout:
            event = json.loads(line)
            yield event
            if event["event"] != "progress":
                return
        code = process.wait()
        words = self.errors.read_text(encoding="utf-8", errors="replace") if self.errors.exists() else ""
        yield {"event": "error", "kind": "run", "message": self._exit_message(code, words)}

    def _exit_message(self, code: int, words: str) -> str:
        if code == KILLED:
            return "a worker was killed, possibly because memory ran out; finished work is saved (--resume continues)"
        last = " ".join(words.strip().splitlines()[-1:])
        return f"a worker ended with status {code}: {last} (see {self.errors})"

    def start(self) -> subprocess.Popen[str]:
        """Start the process if it is not running, so that it loads its code."""
        if self._process is not None:
            return self._process
        with self.errors.open("w", encoding="utf-8") as errors:
            # its own session: Ctrl-C reaches only the study, which asks its workers to save and stop
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
            )  # fmt: skip
        return self._process

    def ask_to_stop(self) -> None:
        """Ask it to finish its step and save."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """End the process; if it failed, its error file is kept."""
        process = self._process
        if process is None:
            return
        failed = process.poll() not in (None, 0)
        if process.poll() is None:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
        if not failed or (self.errors.exists() and not self.errors.stat().st_size):
            self.errors.unlink(missing_ok=True)
