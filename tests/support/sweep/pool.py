"""Judges classes in separate processes, one after another in each, with a time limit for classes that hang."""

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

Task = tuple[str, str]
_SPAWN = multiprocessing.get_context("spawn")


class _Worker:
    def __init__(self, work: Callable[[str, str], dict[str, Any]]) -> None:
        self.connection, other = _SPAWN.Pipe()
        self.process: SpawnProcess = _SPAWN.Process(target=_serve, args=(other, work), daemon=True)
        self.process.start()
        other.close()
        self.task: Task | None = None
        self.since = 0.0

    def give(self, task: Task) -> None:
        self.task, self.since = task, time.monotonic()
        self.connection.send(task)

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _serve(connection: Connection, work: Callable[[str, str], dict[str, Any]]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    while True:
        try:
            connection.send(work(*connection.recv()))
        except EOFError:
            return


def judged(
    tasks: list[Task], work: Callable[[str, str], dict[str, Any]], *, processes: int, limit: float
) -> Iterator[dict[str, Any]]:
    """Reports as they come.

    Args:
        tasks: Classes with their model types.
        work: Makes the report of one; a function of a module.
        processes: How many at a time.
        limit: Seconds for one class, the start of a process included.

    Yields:
        What ``work`` returned; for a class that took too long or ended its process, a report that was not built.
    """
    left = deque(tasks)
    workers = [_Worker(work) for _ in range(min(processes, len(tasks)))]
    try:
        while left or any(worker.task for worker in workers):
            for worker in workers:
                if worker.task is None and left:
                    worker.give(left.popleft())
            busy = [worker for worker in workers if worker.task]
            ready = wait([worker.connection for worker in busy], timeout=1.0)
            for number, worker in enumerate(workers):
                if worker.task is None:
                    continue
                reason = None
                if worker.connection in ready:
                    try:
                        report = worker.connection.recv()
                    except EOFError:
                        reason = "the process ended"
                    else:
                        worker.task = None
                        yield report
                elif time.monotonic() - worker.since > limit:
                    reason = f"took longer than {limit:g} s"
                if reason:
                    name, model_type = worker.task
                    worker.stop()
                    workers[number] = _Worker(work)
                    yield {"class": name, "model_type": model_type, "built": reason, "found": []}
    finally:
        for worker in workers:
            worker.stop()
