"""Progress of a study: one row per arm on a terminal, plain lines elsewhere."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from cggr_train.display import format_bytes
from cggr_train.report.text import duration
from cggr_train.study.arms import Arm
from cggr_train.study.pool import Request

SILENCE_SECONDS = 4.0
"""Without a terminal, a status line is printed after this many seconds without output."""


class LiveTable:
    """Follows the records of a study and the progress of its runs.

    Args:
        console: Where to print.
        arms: The rows.
        seeds: Runs of each arm.
    """

    def __init__(self, console: Console, arms: Sequence[Arm], seeds: int) -> None:
        self.console, self.seeds = console, seeds
        self.arms = {arm.name: arm for arm in arms}
        self._stage = ""
        self._stage_began = self._last_line = time.monotonic()
        self._done_before = 0.0
        self._ended = threading.Event()
        self._times: dict[str, list[float]] = {name: [] for name in self.arms}
        self._memory: dict[str, int] = {}
        self._losses: dict[str, list[float]] = {name: [] for name in self.arms}
        self._diverged: dict[str, int] = dict.fromkeys(self.arms, 0)
        self._running: dict[tuple[str, int], tuple[float, float]] = {}
        self._live = (
            Live(console=console, get_renderable=self._table, refresh_per_second=4) if console.is_terminal else None
        )
        self._heartbeat = threading.Thread(target=self._print_when_quiet, daemon=True)

    def __enter__(self) -> LiveTable:
        """Show the table."""
        if self._live is not None:
            self._live.start()
        else:
            self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop updating the table and release the terminal."""
        self._ended.set()
        if self._live is not None:
            self._live.stop()
        elif self._heartbeat.is_alive():
            self._heartbeat.join()

    def show_arms(self, arms: Sequence[Arm]) -> None:
        """Replace the rows."""
        self.arms = {arm.name: arm for arm in arms}

    def stage(self, name: str) -> None:
        """Set the current stage."""
        self._stage = name
        self._stage_began, self._done_before = time.monotonic(), self._runs_done()
        self._say(f"{name} …")

    def progress(self, request: Request, values: Mapping[str, Any]) -> None:
        """Record the progress of a run."""
        key = (request.fields["arm"], request.fields.get("seed", -1))
        self._running[key] = (values["step"] / values["steps"], values["loss"])

    def take(self, record: Mapping[str, Any]) -> None:
        """Record a finished measurement."""
        if record["event"] == "rate":
            self._running.pop((record["arm"], -1), None)
            where = f"{self.arms[record['arm']].label}, learning rate {record['rate']:g}"
            self._say(f"{where}: " + _loss_reached(record))
        elif record["event"] == "out_of_memory":
            for key in [key for key in self._running if key[0] == record["arm"]]:
                del self._running[key]
        elif record["event"] == "timing":
            self._times[record["arm"]] += record["step_seconds"]
            self._memory.setdefault(record["arm"], record["peak_bytes"])
        elif record["event"] == "fit" and record["micro_batch"] is not None:
            how = ", checkpointed" if record["checkpointing"] else ""
            self._say(f"{self.arms[record['arm']].label}: {record['micro_batch']} at a time{how}")
        elif record["event"] == "run":
            self._running.pop((record["arm"], record["seed"]), None)
            label = f"{self.arms[record['arm']].title}, seed {record['seed']}"
            if "diverged" in record:
                self._diverged[record["arm"]] += 1
                self._say(f"{label}: diverged at step {record['diverged']:,}")
                return
            loss = record["points"][-1]["heldout_loss"]
            self._losses[record["arm"]].append(loss)
            self._say(f"{label}: held-out loss {loss:.4f}")

    def _say(self, line: str) -> None:
        if self._live is None:
            self._last_line = time.monotonic()
            self.console.print(line, highlight=False)

    def _print_when_quiet(self) -> None:
        while not self._ended.wait(0.2):
            if time.monotonic() - self._last_line >= SILENCE_SECONDS:
                self._say(self.status_line())

    def _runs_done(self) -> float:
        """Number of finished runs, and the progress of running ones."""
        under_way = [share for (_, seed), (share, _) in list(self._running.items()) if seed >= 0]
        return sum(map(len, self._losses.values())) + sum(self._diverged.values()) + sum(under_way)

    def status_line(self) -> str:
        """Status of the study: its stage, which runs are active, and the time left."""
        now = time.monotonic() - self._stage_began
        total = len(self.arms) * self.seeds
        under_way = [share for (_, seed), (share, _) in list(self._running.items()) if seed >= 0]
        if not under_way:
            return f"{self._stage} · {clock(now)}"
        done = self._runs_done()
        first = int(done - sum(under_way) + 0.5) + 1
        which = f"run {first}" if len(under_way) == 1 else f"runs {first} to {first + len(under_way) - 1}"
        text = f"{self._stage} · {which} of {total} · {', '.join(f'{share:.0%}' for share in under_way)}"
        gained = done - self._done_before
        if gained > 0.05:
            text += f" · about {clock(now / gained * (total - done))} left"
        return text

    def _table(self) -> Table:
        table = Table(
            title=self.status_line(), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        table.add_column("arm", overflow="fold")  # where there is little room, names break and figures do not
        for heading in ("step", "peak memory", "runs", "now", "training loss", "held-out loss"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, arm in self.arms.items():
            times, losses = self._times[name], self._losses[name]
            diverged = self._diverged[name]
            running = [state for (other, _), state in self._running.items() if other == name]
            table.add_row(
                arm.title,
                duration(statistics.median(times)) if times else "",
                format_bytes(self._memory[name]) if name in self._memory else "",
                f"{len(losses) + diverged}/{self.seeds}",
                " ".join(f"{share:.0%}" for share, _ in running),
                f"{statistics.fmean(loss for _, loss in running):.3f}" if running else "",
                "diverged" if diverged else f"{statistics.fmean(losses):.4f}" if losses else "",
            )
        return table


def clock(seconds: float) -> str:
    """A duration in minutes and seconds.

    Example:
        >>> clock(4.2), clock(75)
        ('4 s', '1:15 min')
    """
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60}:{whole % 60:02d} min"


def _loss_reached(record: Mapping[str, Any]) -> str:
    if "diverged" in record:
        return f"diverged at step {record['diverged']:,}"
    return f"held-out loss {record['points'][-1]['heldout_loss']:.4f}"
