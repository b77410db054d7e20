"""``cggr train``: a run in its folder, from the data files to the last checkpoint.

```
<run>/settings.json          what was asked for
<run>/tokenizer/             loaded or trained
<run>/tokens/                both splits as token ids
<run>/checkpoints/step-…/    the newest ones; each is a model directory
<run>/log.jsonl              one record per line
<run>/learning_curve.png
```
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from cggr_train.checkpoint import checkpoint_path, last_checkpoint_message, latest_checkpoint
from cggr_train.data import TokenStore
from cggr_train.device import uses_bfloat16
from cggr_train.display import Display, mute, numbers
from cggr_train.errors import DivergedError, InputError
from cggr_train.folder_lock import FolderLock
from cggr_train.interrupt import StopRequest
from cggr_train.log import JsonlLog, LogError, read_log
from cggr_train.loop import Budget, LearningRate, LoopSettings, Progress
from cggr_train.memory import memory_in_use, peak_memory
from cggr_train.prepare import prepare, prepared
from cggr_train.presets import load_model
from cggr_train.ranks import Ranks, joined_ranks
from cggr_train.recorded import check_recordable
from cggr_train.session import RunSession, SessionSettings
from cggr_train.settings import STUDY, TrainSettings
from cggr_train.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RunResult(NamedTuple):
    """How a run ended."""

    checkpoint: Path
    progress: Progress
    heldout_loss: float | None
    exit_code: int
    """0 at the end of the budget; 129, 130 or 143 after a clean stop by a signal."""


def start_run(settings: TrainSettings, folder: Path, console: Console) -> RunResult:
    """Train from the beginning.

    Args:
        settings: Settings of the run; without a budget it is one pass over the text.
        folder: The run's folder; created if missing, refused if it already holds a checkpoint or a study.
        console: Where progress is shown.

    Raises:
        InputError: If any input is invalid; nothing is trained in that case.
        SaveError: If a checkpoint or the log cannot be written.
        DivergedError: If the loss is no longer finite.
    """
    if latest_checkpoint(folder / "checkpoints") is not None:
        raise InputError(f"{folder} already holds a run; continue it with --resume {folder}, or give another --out")
    if (folder / STUDY).exists():
        raise InputError(f"{folder} holds a study, whose files a run would overwrite; give another --out")
    with _locked(settings, folder, console) as (ranks, device):
        made = ranks.on_rank_zero(lambda: prepare(settings, folder, console)) or prepared(settings, folder)
        model, tokenizer, tokens = made
        if settings.steps is None and settings.seconds is None:
            sequences = len(tokens.train) // settings.length
            settings = dataclasses.replace(settings, steps=-(-sequences // (settings.batch_size * settings.accumulate)))
        ranks.on_rank_zero(lambda: settings.save(folder / "settings.json"))
        session = RunSession(session_settings(settings, device), model, tokens, device, ranks=ranks)
        return _Run(session, settings, folder, console, tokenizer).train()


def resume_run(folder: Path, console: Console, *, steps: int | None = None, seconds: float | None = None) -> RunResult:
    """Continue from the newest checkpoint, with the settings the run was started with.

    With an unchanged budget in steps, the weights end up equal to those of an uninterrupted run: same batches,
    selections and learning rates, on the same device with the same number of threads.

    Args:
        folder: The run's folder.
        console: Where progress is shown.
        steps: Train up to this step instead.
        seconds: Train up to this many seconds instead, the earlier ones included.

    Raises:
        InputError: If the folder holds no run to continue.
        SaveError: If a checkpoint or the log cannot be written.
        DivergedError: If the loss is no longer finite.
    """
    settings = TrainSettings.load(folder / "settings.json")
    if steps is not None or seconds is not None:
        settings = dataclasses.replace(settings, steps=steps, seconds=seconds)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{folder} holds no checkpoint to resume from; start again with --out")
    with _locked(settings, folder, console) as (ranks, device):
        tokens = TokenStore.open(folder / "tokens")
        model, tokenizer = load_model(str(checkpoint)), load_tokenizer(str(checkpoint))
        session = RunSession(session_settings(settings, device), model, tokens, device, ranks=ranks, resumed=checkpoint)
        session.resume(checkpoint)
        console.print(f"resuming {folder} from step {session.progress.step:,}", highlight=False)
        return _Run(session, settings, folder, console, tokenizer).train()


@contextmanager
def _locked(settings: TrainSettings, folder: Path, console: Console) -> Iterator[tuple[Ranks, torch.device]]:
    """The ranks of a run and its device, with the folder locked and one rank that shows progress."""
    shared = joined_ranks(settings.device, batch_size=settings.batch_size)
    with shared as (ranks, device), FolderLock(folder) as lock:
        console.quiet = console.quiet or not ranks.main
        if settings.cuda_graph is True:
            check_recordable(device, settings.method, settings.routing, processes=ranks.size)
        ranks.on_rank_zero(lock.take)
        yield ranks, device


def session_settings(settings: TrainSettings, device: torch.device) -> SessionSettings:
    """The settings of ``cggr train`` as session settings."""
    return SessionSettings(
        method=settings.method,
        routing=settings.routing,
        length=settings.length,
        batch_size=settings.batch_size,
        seed=settings.seed,
        weight_decay=settings.weight_decay,
        eval_sequences=settings.eval_sequences,
        loop=LoopSettings(
            budget=Budget(settings.steps, settings.seconds),
            learning_rate=LearningRate(settings.learning_rate, warmup=settings.lr_warmup),
            accumulate=settings.accumulate,
            clip=settings.clip or None,
            bfloat16=uses_bfloat16(settings.precision, device),
            cuda_graph=settings.cuda_graph,
        ),
    )


class _Run:
    """What ``cggr train`` does around the steps of a session: log, evaluate, save, show progress."""

    def __init__(
        self, session: RunSession, settings: TrainSettings, folder: Path, console: Console,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:  # fmt: skip
        self.session, self.settings, self.folder, self.console = session, settings, folder, console
        self.ranks, self.tokenizer = session.ranks, tokenizer
        self.saved: tuple[int, Path] | None = None
        if session.progress.step:
            self.saved = (session.progress.step, checkpoint_path(folder / "checkpoints", session.progress.step))
        self.heldout_loss: float | None = None
        self._window: list[Tensor] = []
        self._window_start = dataclasses.replace(session.progress)

    @property
    def progress(self) -> Progress:
        return self.session.progress

    def train(self) -> RunResult:
        settings = self.settings
        alone, main = self.ranks.size == 1, self.ranks.main
        self.log = JsonlLog(self.folder / "log.jsonl", keep_until_step=self.progress.step) if main else None
        shown = Display(self.console, settings.method, self.session.settings.loop.budget)
        stopping = StopRequest(launched=not alone, quiet=not main, on_hangup=lambda: mute(self.console))
        with stopping as stop, shown as display:
            self.display = display
            try:
                self.session.train(self._after_step, stop=lambda: stop.requested)
                self._log_window()
                stopped, code = self.ranks.agree(stop.requested, stop.exit_code if stop.requested else 0)
                if not stopped:
                    self._evaluate()
                checkpoint = self._save()
            except (DivergedError, LogError) as error:
                raise type(error)(f"{error}; {last_checkpoint_message(self.folder / 'checkpoints')}") from error
            if self.ranks.main:
                self._draw()
        return RunResult(checkpoint, self.progress, self.heldout_loss, int(code))

    def _after_step(self, loss: Tensor, rate: float) -> None:
        step = self.progress.step
        self._window.append(loss)
        self._rate = rate
        saving, evaluating = step % self.settings.save_every == 0, step % self.settings.eval_every == 0
        if step % self.settings.log_every == 0 or saving or evaluating:
            self._log_window()
        self.display.advance(self.progress)
        ending = self.session.settings.loop.budget.spent(self.progress) >= 1
        if evaluating and not ending:
            self._evaluate()
        if saving and not ending:
            self._save()

    def _log_window(self) -> None:
        if not self._window:
            return
        (loss,) = self.ranks.mean([torch.stack(self._window).mean().item()])
        progress, before = self.progress, self._window_start
        rate = (progress.tokens - before.tokens) / max(progress.seconds - before.seconds, 1e-9)
        metrics = self._metrics()
        memory = memory_in_use(self.session.device)
        self._write(
            event="train",
            step=progress.step,
            loss=loss,
            learning_rate=self._rate,
            tokens=progress.tokens,
            seconds=round(progress.seconds, 4),
            tokens_per_second=round(rate, 1),
            memory_bytes=memory,
            peak_memory_bytes=peak_memory(self.session.device),
            **{name: value for name, value in metrics.items() if name != "loss"},
        )
        if not math.isfinite(loss):
            raise DivergedError(f"the loss is {loss} at step {progress.step:,}; lower --learning-rate")
        keep = float(metrics.get("keep_ratio", 1.0))
        self.display.show(
            numbers(step=progress.step, loss=loss, keep_ratio=keep, tokens_per_second=rate, memory=memory)
        )
        self._window, self._window_start = [], dataclasses.replace(progress)

    def _metrics(self) -> dict[str, Any]:
        """The learner's metrics over all ranks, as plain values; each rank has the same number of countable tokens."""
        found = {
            name: value.item() if isinstance(value, Tensor) else value
            for name, value in self.session.learner.metrics.items()
        }
        numbers = {name: float(value) for name, value in found.items() if not isinstance(value, str)}
        if self.ranks.size > 1:
            found |= dict(zip(numbers, self.ranks.mean(list(numbers.values())), strict=True))
            for name in ("kept_tokens", "countable_tokens"):
                found[name] = round(found[name] * self.ranks.size)
        return found

    def _write(self, **record: Any) -> None:
        if self.log is not None:
            self.log.write(**record)

    def _evaluate(self) -> None:
        self.heldout_loss = self.session.evaluate()
        progress = self.progress
        self._write(
            event="heldout",
            step=progress.step,
            heldout_loss=self.heldout_loss,
            tokens=progress.tokens,
            seconds=round(progress.seconds, 4),
        )
        if not math.isfinite(self.heldout_loss):
            raise DivergedError(
                f"the held-out loss is {self.heldout_loss} at step {progress.step:,}; lower --learning-rate"
            )
        self.display.note(f"step {progress.step:,} · held-out loss {self.heldout_loss:.4f}")

    def _save(self) -> Path:
        if self.saved is not None and self.saved[0] == self.progress.step:
            return self.saved[1]
        path = self.session.save(self.folder / "checkpoints", self.tokenizer, keep=self.settings.keep)
        self.saved = (self.progress.step, path)
        return path

    def _draw(self) -> None:
        from cggr_train.report.curves import draw_learning_curve

        draw_learning_curve(read_log(self.folder / "log.jsonl"), self.folder / "learning_curve.png")
