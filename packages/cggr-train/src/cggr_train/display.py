"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cggr_train.loop import Budget
from cggr_train.loop import Progress as TrainingProgress


def bar(console: Console) -> Progress:
    """A progress bar with a ``numbers`` field, for one run or several below each other."""
    name, share = TextColumn("[bold]{task.description}"), TextColumn("{task.percentage:>3.0f}%")
    figures = TextColumn("{task.fields[numbers]}")
    if console.width < 110:
        return Progress(name, share, figures, console=console)
    return Progress(name, BarColumn(bar_width=24), share, figures, TimeRemainingColumn(compact=True), console=console)


def numbers(*, step: int, loss: float, keep_ratio: float, tokens_per_second: float, memory: int) -> str:
    """The figures next to the bar.

    Example:
        >>> numbers(step=10, loss=4.5, keep_ratio=0.25, tokens_per_second=9876.5, memory=512 * 2**20)
        'step 10 · loss 4.500 · keep 25% · 9,876 tok/s · 512 MiB'
    """
    return (
        f"step {step:,} · loss {loss:.3f} · keep {keep_ratio:.0%} · {tokens_per_second:,.0f} tok/s · "
        f"{format_bytes(memory)}"
    )


def format_bytes(count: float) -> str:
    """Bytes in binary units, about three digits."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def mute(console: Console) -> None:
    """Stop writing: the terminal is gone, and an error would end the run before it is saved."""
    console.quiet = True


class Display:
    """Shows one run.

    Args:
        console: Where to print.
        name: Title next to the bar.
        budget: What the bar counts.
    """

    def __init__(self, console: Console, name: str, budget: Budget) -> None:
        self.console = console
        self.name = name
        self.budget = budget
        self._bar = bar(console) if console.is_terminal else None
        self._task: TaskID | None = None

    def __enter__(self) -> Display:
        """Start showing the bar."""
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=1.0, numbers="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop updating the bar and release the terminal."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, progress: TrainingProgress) -> None:
        """Advance the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=min(1.0, self.budget.spent(progress)))

    def show(self, text: str) -> None:
        """Show new figures, next to the bar or as a line if there is no bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, numbers=text)
        else:
            self.console.print(text, highlight=False)

    def note(self, text: str) -> None:
        """Print a permanent line above the bar."""
        self.console.print(text, highlight=False, soft_wrap=True)
