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
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from cggr_train.checkpoint import (
    TrainingState,
    latest_checkpoint,
    load_training_state,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from cggr_train.data import Batches, TokenStore
from cggr_train.data.batches import in_order
from cggr_train.device import pick_device, uses_bfloat16
from cggr_train.display import Display, numbers
from cggr_train.errors import DivergedError, InputError
from cggr_train.evaluate import heldout_loss
from cggr_train.interrupt import StopRequest
from cggr_train.learner import build_learner
from cggr_train.log import JsonlLog, read_log
from cggr_train.loop import Budget, Clock, LearningRate, LoopSettings, Progress, build_optimizer, train_steps
from cggr_train.memory import memory_in_use, peak_memory
from cggr_train.prepare import prepare
from cggr_train.presets import load_model
from cggr_train.settings import TrainSettings
from cggr_train.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RunResult(NamedTuple):
    """How a run ended."""

    checkpoint: Path
    progress: Progress
    heldout_loss: float | None
    exit_code: int
    """0 at the end of the budget; 130 or 143 after a clean stop by a signal."""


def start_run(settings: TrainSettings, folder: Path, console: Console) -> RunResult:
    """Train from the beginning.

    Args:
        settings: What to do; without a budget it is one pass over the text.
        folder: The run's folder; made if missing, refused if it already holds a checkpoint.
        console: Where progress is shown.

    Raises:
        InputError: If anything given cannot be used; nothing is trained then.
        SaveError: If a checkpoint cannot be written.
        DivergedError: If the loss is no longer finite.
    """
    if latest_checkpoint(folder / "checkpoints") is not None:
        raise InputError(f"{folder} already holds a run; continue it with --resume {folder}, or give another --out")
    if settings.steps is not None or settings.seconds is not None:
        Budget(settings.steps, settings.seconds)
    device = pick_device(settings.device)
    model, tokenizer, tokens = prepare(settings, folder, console)
    if settings.steps is None and settings.seconds is None:
        sequences = len(tokens.train) // settings.length
        settings = dataclasses.replace(settings, steps=-(-sequences // (settings.batch_size * settings.accumulate)))
    settings.save(folder / "settings.json")
    run = _Run(settings, folder, console, device, model, tokenizer, tokens)
    return run.train()


def resume_run(folder: Path, console: Console, *, steps: int | None = None, seconds: float | None = None) -> RunResult:
    """Continue from the newest checkpoint, with the settings the run was started with.

    With the budget unchanged and given in steps, the weights become those of a run that was never stopped: the same
    batches, selections and learning rates, on the same device with the same number of threads.

    Args:
        folder: The run's folder.
        console: Where progress is shown.
        steps: Train up to this step instead.
        seconds: Train up to this many seconds instead, the earlier ones included.

    Raises:
        InputError: If the folder holds no run to continue.
        SaveError: If a checkpoint cannot be written.
        DivergedError: If the loss is no longer finite.
    """
    settings = TrainSettings.load(folder / "settings.json")
    if steps is not None or seconds is not None:
        settings = dataclasses.replace(settings, steps=steps, seconds=seconds)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{folder} holds no checkpoint to resume from; start it anew with --out")
    device = pick_device(settings.device)
    state = load_training_state(checkpoint)
    tokens = TokenStore.open(folder / "tokens")
    model, tokenizer = load_model(str(checkpoint)), load_tokenizer(str(checkpoint))
    run = _Run(settings, folder, console, device, model, tokenizer, tokens)
    run.restore(state)
    console.print(f"resuming {folder} from step {state.progress.step:,}", highlight=False)
    return run.train()


class _Run:
    def __init__(
        self,
        settings: TrainSettings,
        folder: Path,
        console: Console,
        device: torch.device,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: TokenStore,
    ) -> None:
        self.settings, self.folder, self.console, self.device = settings, folder, console, device
        self.model, self.tokenizer = model, tokenizer
        torch.nn.Module.to(model, device)
        self.learner = build_learner(self.model, settings.method, settings.routing, seed=settings.seed)
        self.optimizer = build_optimizer(self.model, weight_decay=settings.weight_decay)
        size = {"length": settings.length, "batch_size": settings.batch_size}
        self.batches = Batches(tokens.train, **size, seed=settings.seed)
        self.heldout = in_order(tokens.heldout, **size, limit=settings.eval_sequences)
        self.loop = LoopSettings(
            budget=Budget(settings.steps, settings.seconds),
            learning_rate=LearningRate(settings.learning_rate, warmup=settings.lr_warmup),
            accumulate=settings.accumulate,
            clip=settings.clip or None,
            bfloat16=uses_bfloat16(settings.precision, device),
        )
        self.progress = Progress()
        self.saved: tuple[int, Path] | None = None
        self.heldout_loss: float | None = None
        self._window: list[Tensor] = []
        self._window_start = Progress()

    def restore(self, state: TrainingState) -> None:
        self.progress = state.progress
        self.optimizer.load_state_dict(state.optimizer)
        self.learner.load_state_dict(state.learner)
        restore_random_state(state.random, self.device)
        self._window_start = dataclasses.replace(self.progress)
        self.saved = (self.progress.step, self.folder / "checkpoints" / f"step-{self.progress.step:08d}")

    def train(self) -> RunResult:
        settings = self.settings
        self.log = JsonlLog(self.folder / "log.jsonl", keep_until_step=self.progress.step)
        with StopRequest() as stop, Display(self.console, settings.method, self.loop.budget) as display:
            self.display = display
            self.clock = Clock(self.device, elapsed=self.progress.seconds)
            train_steps(
                self.learner, self.optimizer, self.batches, self.loop, self.progress, self.clock,
                on_step=self._after_step, stop=lambda: stop.requested,
            )  # fmt: skip
            self._log_window()
            if not stop.requested:
                self._evaluate()
            checkpoint = self._save()
            self._draw()
        return RunResult(checkpoint, self.progress, self.heldout_loss, stop.exit_code if stop.requested else 0)

    def _after_step(self, loss: Tensor, rate: float) -> None:
        step = self.progress.step
        self._window.append(loss)
        self._rate = rate
        saving, evaluating = step % self.settings.save_every == 0, step % self.settings.eval_every == 0
        if step % self.settings.log_every == 0 or saving or evaluating:
            self._log_window()
        self.display.advance(self.progress)
        ending = self.loop.budget.spent(self.progress) >= 1
        if evaluating and not ending:
            self._evaluate()
        if saving and not ending:
            self._save()

    def _log_window(self) -> None:
        if not self._window:
            return
        loss = torch.stack(self._window).mean().item()
        progress, before = self.progress, self._window_start
        rate = (progress.tokens - before.tokens) / max(progress.seconds - before.seconds, 1e-9)
        metrics = {
            name: value.item() if isinstance(value, Tensor) else value for name, value in self.learner.metrics.items()
        }
        memory = memory_in_use(self.device)
        self.log.write(
            event="train",
            step=progress.step,
            loss=loss,
            learning_rate=self._rate,
            tokens=progress.tokens,
            seconds=round(progress.seconds, 4),
            tokens_per_second=round(rate, 1),
            memory_bytes=memory,
            peak_memory_bytes=peak_memory(self.device),
            **{name: value for name, value in metrics.items() if name != "loss"},
        )
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss is {loss} at step {progress.step:,}; lower --learning-rate. Checkpoints in "
                f"{self.folder / 'checkpoints'} are from before"
            )
        keep = float(metrics.get("keep_ratio", 1.0))
        self.display.show(
            numbers(step=progress.step, loss=loss, keep_ratio=keep, tokens_per_second=rate, memory=memory)
        )
        self._window, self._window_start = [], dataclasses.replace(progress)

    def _evaluate(self) -> None:
        with self.clock.paused():
            self.heldout_loss = heldout_loss(self.model, self.heldout, device=self.device, bfloat16=self.loop.bfloat16)
        progress = self.progress
        self.log.write(
            event="heldout",
            step=progress.step,
            heldout_loss=self.heldout_loss,
            tokens=progress.tokens,
            seconds=round(progress.seconds, 4),
        )
        self.display.note(f"step {progress.step:,} · held-out loss {self.heldout_loss:.4f}")

    def _save(self) -> Path:
        if self.saved is not None and self.saved[0] == self.progress.step:
            return self.saved[1]
        with self.clock.paused():
            state = TrainingState(
                self.progress, self.optimizer.state_dict(), self.learner.state_dict(), random_state(self.device)
            )
            path = save_checkpoint(
                self.folder / "checkpoints", self.model, self.tokenizer, state, keep=self.settings.keep
            )
        self.saved = (self.progress.step, path)
        return path

    def _draw(self) -> None:
        from cggr_train.report.curves import draw_learning_curve

        draw_learning_curve(read_log(self.folder / "log.jsonl"), self.folder / "learning_curve.png")
