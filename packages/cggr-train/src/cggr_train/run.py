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
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from cggr_train.checkpoint import (
    TrainingState,
    checkpoint_path,
    latest_checkpoint,
    load_training_state,
    random_state,
    restore_random_state,
    save_checkpoint,
    what_is_left,
)
from cggr_train.data import Batches, TokenStore
from cggr_train.data.batches import in_order
from cggr_train.device import uses_bfloat16
from cggr_train.display import Display, numbers, silence
from cggr_train.errors import DivergedError, InputError
from cggr_train.evaluate import heldout_loss
from cggr_train.folder_lock import FolderLock
from cggr_train.interrupt import StopRequest
from cggr_train.learner import build_learner
from cggr_train.log import JsonlLog, LogError, read_log
from cggr_train.loop import Budget, Clock, LearningRate, LoopSettings, Progress, build_optimizer, train_steps
from cggr_train.memory import memory_in_use, peak_memory
from cggr_train.prepare import prepare, prepared
from cggr_train.presets import load_model
from cggr_train.ranks import Ranks, joined_ranks
from cggr_train.recorded import check_recordable
from cggr_train.remembered_file import FILE_NAME, fingerprint, load_remembered, save_remembered
from cggr_train.settings import STUDY, TrainSettings
from cggr_train.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cggr_core.experimental import RememberedScores


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
        settings: What to do; without a budget it is one pass over the text.
        folder: The run's folder; made if missing, refused if it already holds a checkpoint or a study.
        console: Where progress is shown.

    Raises:
        InputError: If anything given cannot be used; nothing is trained then.
        SaveError: If a checkpoint or the log cannot be written.
        DivergedError: If the loss is no longer finite.
    """
    if latest_checkpoint(folder / "checkpoints") is not None:
        raise InputError(f"{folder} already holds a run; continue it with --resume {folder}, or give another --out")
    if (folder / STUDY).exists():
        raise InputError(f"{folder} holds a study, whose files a run would replace; give another --out")
    shared = joined_ranks(settings.device, batch_size=settings.batch_size)
    with shared as (ranks, device), FolderLock(folder) as lock:
        console.quiet = console.quiet or not ranks.main
        if settings.cuda_graph:
            check_recordable(device, settings.method, settings.routing, processes=ranks.size)
        ranks.on_first(lock.take)
        made = ranks.on_first(lambda: prepare(settings, folder, console)) or prepared(settings, folder)
        model, tokenizer, tokens = made
        if settings.steps is None and settings.seconds is None:
            sequences = len(tokens.train) // settings.length
            settings = dataclasses.replace(settings, steps=-(-sequences // (settings.batch_size * settings.accumulate)))
        ranks.on_first(lambda: settings.save(folder / "settings.json"))
        run = _Run(settings, folder, console, ranks, device, model, tokenizer, tokens)
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
        SaveError: If a checkpoint or the log cannot be written.
        DivergedError: If the loss is no longer finite.
    """
    settings = TrainSettings.load(folder / "settings.json")
    if steps is not None or seconds is not None:
        settings = dataclasses.replace(settings, steps=steps, seconds=seconds)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise InputError(f"{folder} holds no checkpoint to resume from; start it anew with --out")
    shared = joined_ranks(settings.device, batch_size=settings.batch_size)
    with shared as (ranks, device), FolderLock(folder) as lock:
        console.quiet = console.quiet or not ranks.main
        if settings.cuda_graph:
            check_recordable(device, settings.method, settings.routing, processes=ranks.size)
        ranks.on_first(lock.take)
        state = load_training_state(checkpoint)
        tokens = TokenStore.open(folder / "tokens")
        model, tokenizer = load_model(str(checkpoint)), load_tokenizer(str(checkpoint))
        run = _Run(settings, folder, console, ranks, device, model, tokenizer, tokens, resumed=checkpoint)
        run.restore(state)
        console.print(f"resuming {folder} from step {state.progress.step:,}", highlight=False)
        return run.train()


class _Run:
    def __init__(
        self,
        settings: TrainSettings,
        folder: Path,
        console: Console,
        ranks: Ranks,
        device: torch.device,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        tokens: TokenStore,
        resumed: Path | None = None,
    ) -> None:
        self.settings, self.folder, self.console = settings, folder, console
        self.ranks, self.device = ranks, device
        self.model, self.tokenizer = model, tokenizer
        torch.nn.Module.to(model, device)
        size = {"length": settings.length, "batch_size": settings.batch_size}
        self.batches = Batches(tokens.train, **size, seed=settings.seed)
        self.memory: RememberedScores | None = None
        if settings.routing.router == "remembered":
            self.examples = fingerprint(self.batches.sequences)
            self.memory = self._remembered(resumed)
        self.learner = build_learner(
            self.model, settings.method, settings.routing, seed=settings.seed, memory=self.memory
        )
        self.learner.wrapped = ranks.wrap(self.model, device)
        if ranks.size > 1:
            torch.manual_seed(settings.seed + ranks.rank)  # every rank drops out others of its activations
        self.optimizer = build_optimizer(self.model, weight_decay=settings.weight_decay, capturable=settings.cuda_graph)
        self.heldout = in_order(tokens.heldout, **size, limit=settings.eval_sequences)
        self.loop = LoopSettings(
            budget=Budget(settings.steps, settings.seconds),
            learning_rate=LearningRate(settings.learning_rate, warmup=settings.lr_warmup),
            accumulate=settings.accumulate,
            clip=settings.clip or None,
            bfloat16=uses_bfloat16(settings.precision, device),
            cuda_graph=settings.cuda_graph,
        )
        self.progress = Progress()
        self.saved: tuple[int, Path] | None = None
        self.heldout_loss: float | None = None
        self._window: list[Tensor] = []
        self._window_start = Progress()

    def _remembered(self, resumed: Path | None) -> RememberedScores:
        from cggr_core.experimental import RememberedScores

        if resumed is not None:
            return load_remembered(resumed / FILE_NAME, examples=self.examples)
        return RememberedScores.empty(examples=self.batches.num_sequences, length=self.batches.length)

    def _save_memory(self, checkpoint: Path) -> None:
        assert self.memory is not None  # else nobody asks
        save_remembered(checkpoint / FILE_NAME, self.memory, examples=self.examples)

    def restore(self, state: TrainingState) -> None:
        self.progress = state.progress
        self.optimizer.load_state_dict(state.optimizer)
        self.learner.load_state_dict(state.learner)
        restore_random_state(state.random, self.device, self.ranks)
        self._window_start = dataclasses.replace(self.progress)
        self.saved = (self.progress.step, checkpoint_path(self.folder / "checkpoints", self.progress.step))

    def train(self) -> RunResult:
        settings = self.settings
        alone, main = self.ranks.size == 1, self.ranks.main
        self.log = JsonlLog(self.folder / "log.jsonl", keep_until_step=self.progress.step) if main else None
        shown = Display(self.console, settings.method, self.loop.budget)
        stopping = StopRequest(launched=not alone, quiet=not main, on_hangup=lambda: silence(self.console))
        with stopping as stop, shown as display:
            self.display = display
            self.clock = Clock(self.device, elapsed=self.progress.seconds)
            try:
                train_steps(
                    self.learner, self.optimizer, self.batches, self.loop, self.progress, self.clock,
                    on_step=self._after_step, stop=lambda: stop.requested, ranks=self.ranks,
                )  # fmt: skip
                self._log_window()
                stopped, code = self.ranks.agree(stop.requested, stop.exit_code if stop.requested else 0)
                if not stopped:
                    self._evaluate()
                checkpoint = self._save()
            except (DivergedError, LogError) as error:
                raise type(error)(f"{error}; {what_is_left(self.folder / 'checkpoints')}") from error
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
        ending = self.loop.budget.spent(self.progress) >= 1
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
        memory = memory_in_use(self.device)
        self._write(
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
            raise DivergedError(f"the loss is {loss} at step {progress.step:,}; lower --learning-rate")
        keep = float(metrics.get("keep_ratio", 1.0))
        self.display.show(
            numbers(step=progress.step, loss=loss, keep_ratio=keep, tokens_per_second=rate, memory=memory)
        )
        self._window, self._window_start = [], dataclasses.replace(progress)

    def _metrics(self) -> dict[str, Any]:
        """The learner's, as plain values, of all ranks together; each has the same number of countable tokens."""
        found = {
            name: value.item() if isinstance(value, Tensor) else value for name, value in self.learner.metrics.items()
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
        with self.clock.paused():
            self.heldout_loss = heldout_loss(
                self.model,
                self.heldout[self.ranks.rank :: self.ranks.size],
                device=self.device,
                bfloat16=self.loop.bfloat16,
                reduce=self.ranks.sum,
            )
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
        folder = self.folder / "checkpoints"
        with self.clock.paused():
            random = random_state(self.device, self.ranks)
            state = TrainingState(self.progress, self.optimizer.state_dict(), self.learner.state_dict(), random)
            if self.memory is not None:
                self.memory.flush()  # on every rank, so that all go on from the same scores
            also = None if self.memory is None else self._save_memory
            self.ranks.on_first(
                lambda: save_checkpoint(folder, self.model, self.tokenizer, state, keep=self.settings.keep, also=also)
            )
        path = checkpoint_path(folder, self.progress.step)
        self.saved = (self.progress.step, path)
        return path

    def _draw(self) -> None:
        from cggr_train.report.curves import draw_learning_curve

        draw_learning_curve(read_log(self.folder / "log.jsonl"), self.folder / "learning_curve.png")
