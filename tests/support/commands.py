"""The ``cggr`` command in a separate process, without the seconds that a new one spends on imports."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.support.forks import FORKS

TIMEOUT = 300


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


class Command:
    """A running ``cggr``, whose end is waited for when the context is left.

    Args:
        arguments: Of the command.
        folder: For what it prints.
        before: Called in the process before the command.
    """

    def __init__(self, *arguments: object, folder: Path, before: Callable[[], None] | None = None) -> None:
        reader, writer = FORKS.Pipe(duplex=False)
        self._errors = folder / "errors.txt"
        words = [str(argument) for argument in arguments]
        self._process = FORKS.Process(target=_command, args=(words, writer, self._errors, before))
        self._process.start()
        writer.close()
        self._output = os.fdopen(os.dup(reader.fileno()), encoding="utf-8")
        reader.close()
        self._printed: list[str] = []

    def __enter__(self) -> Command:
        """Return the command itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it if a test failed."""
        if kind is not None:
            self._process.kill()
        self._process.join()
        self._output.close()

    def lines(self) -> Iterator[str]:
        """What it prints, as it prints it."""
        for line in self._output:
            self._printed.append(line)
            yield line

    def send_signal(self, number: int) -> None:
        """As ``kill`` does."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def finish(self) -> Done:
        """Wait for its end."""
        for _ in self.lines():
            pass
        self._process.join(TIMEOUT)
        assert self._process.exitcode is not None, f"still running after {TIMEOUT} s"
        return Done(self._process.exitcode, "".join(self._printed), self._errors.read_text(encoding="utf-8"))


def finish(*arguments: object, folder: Path, before: Callable[[], None] | None = None) -> Done:
    """Run a command to its end."""
    with Command(*arguments, folder=folder, before=before) as command:
        return command.finish()


def small_data(folder: Path) -> Path:
    """JSON Lines to train on, in ``folder``."""
    path = folder / "data.jsonl"
    texts = (f"for n in range({n}):\n    print(n, {n} * n)\n" * 4 for n in range(60))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def interrupt_twice_after_step_five() -> None:
    """Let a run send itself two signals, like a user who presses Ctrl-C twice."""
    from cggr_train import run

    own = run._Run._after_step

    def after_step(self, loss, rate):
        own(self, loss, rate)
        if self.progress.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            print("still alive")

    run._Run._after_step = after_step


def _command(arguments: list[str], output, errors: Path, before: Callable[[], None] | None) -> None:
    import torch

    from cggr_train import cli

    os.dup2(output.fileno(), 1)
    output.close()
    with errors.open("wb") as file:
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    os.environ |= {"COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    sys.argv = ["cggr", *arguments]
    if before is not None:
        before()
    cli.main()
