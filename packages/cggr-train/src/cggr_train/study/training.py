"""One run of a study: an arm, a seed, a number of steps, and held-out losses on the way."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from cggr_train.checkpoint import (
    TrainingState,
    latest_checkpoint,
    load_training_state,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from cggr_train.errors import DivergedError, InputError, SaveError
from cggr_train.evaluate import heldout_loss
from cggr_train.loop import Clock, Progress, train_steps
from cggr_train.remembered_file import FILE_NAME, fingerprint, save_remembered
from cggr_train.study.arms import Arm
from cggr_train.study.average import RunningAverage
from cggr_train.study.context import StudyContext, Training

TELL_SECONDS, SAVE_SECONDS = 1.0, 60.0
ROUTER_METRICS = ("router_correlation", "remembered", "score_age_epochs")
"""Of a learned router, and of remembered scores: how well they tell the scores, and how old those are."""


def train_run(
    context: StudyContext,
    arm: Arm,
    seed: int,
    *,
    points: Sequence[int],
    warmup_steps: float,
    eval_sequences: int,
    save_model: bool,
    tell: Callable[..., None],
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Train up to the last of ``points``, or go on from where an interrupted run of the same arm and seed left off.

    Args:
        context: The study.
        arm: How to train.
        seed: Of weights, data order and selections.
        points: Steps after which the averaged weights are evaluated on the held-out batches, ascending.
        warmup_steps: Steps over which the learning rate comes up.
        eval_sequences: Held-out sequences of an evaluation.
        save_model: Keep the averaged weights at the end.
        tell: Called about once a second with ``step``, ``steps`` and ``loss``.
        stop: Asked before every step; a run that is stopped saves a checkpoint.

    Returns:
        ``points`` (each with ``step``, ``tokens``, ``kept_tokens`` and ``heldout_loss`` in nats per token), ``engine``,
        ``router`` (:data:`ROUTER_METRICS` of the last step) and ``train_seconds``, the time of all steps beside
        whatever else ran at the time; None if it was stopped. Of a run whose loss is no longer finite ``points`` up to
        there, ``diverged`` (the step) and ``reason``.

    Raises:
        SaveError: If a checkpoint cannot be written.
    """
    folder = context.folder / "runs" / f"{arm.name}-seed{seed}"
    run = _Run(context, arm, seed, folder, eval_sequences, tell)
    run.resume()
    settings = context.loop(points[-1], warmup_steps=warmup_steps)
    if run.progress.step == 0 and not run.curve:
        run.evaluate()
    remaining = frozenset(points)

    def on_step(loss: torch.Tensor, rate: float) -> None:
        run.after_step(loss, total=points[-1], evaluate=run.progress.step in remaining)

    run.clock = Clock(context.device, elapsed=run.progress.seconds)
    try:
        train_steps(
            run.training.learner, run.training.optimizer, run.training.batches, settings, run.progress, run.clock,
            on_step=on_step, stop=stop,
        )  # fmt: skip
    except DivergedError as error:
        shutil.rmtree(folder)
        return {"points": run.curve, "diverged": run.progress.step, "reason": str(error)}
    if run.progress.step < points[-1]:
        run.save()
        return None
    if save_model:
        run.save_model(folder / "model")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if not save_model:
        folder.rmdir()
    return {
        "points": run.curve,
        "engine": str(run.training.learner.metrics.get("engine", "")),
        "router": {
            name: float(value) for name, value in run.training.learner.metrics.items() if name in ROUTER_METRICS
        },
        "train_seconds": run.progress.seconds,
    }


class _Run:
    def __init__(
        self, context: StudyContext, arm: Arm, seed: int, folder: Path, eval_sequences: int, tell: Callable[..., None]
    ) -> None:
        self.context, self.arm, self.seed, self.folder, self.tell = context, arm, seed, folder, tell
        self.heldout = context.heldout(eval_sequences)
        folder.mkdir(parents=True, exist_ok=True)
        self._checkpoint = latest_checkpoint(folder / "checkpoints")
        self.training: Training = context.training(arm, seed, weights=self._checkpoint)
        self.average = RunningAverage(self.training.learner.model)
        self.progress = Progress()
        self.clock = Clock(context.device)
        self.curve: list[dict[str, Any]] = []
        # on the device, so that counting does not wait for it
        self.kept = torch.zeros((), dtype=torch.int64, device=context.device)
        self._told = self._saved = time.monotonic()

    def resume(self) -> None:
        if self._checkpoint is None:
            return
        state = load_training_state(self._checkpoint)
        self.training.optimizer.load_state_dict(state.optimizer)
        self.training.learner.load_state_dict(state.learner["learner"])
        self.average.load_state_dict(state.learner["average"])
        self.curve = state.learner["curve"]
        self.kept.fill_(state.learner["kept"])
        self.progress = state.progress
        restore_random_state(state.random, self.context.device)

    def after_step(self, loss: torch.Tensor, *, total: int, evaluate: bool) -> None:
        step = self.progress.step
        self.average.update(step)
        self.kept += self.training.learner.metrics["kept_tokens"]
        now = time.monotonic()
        if now - self._told >= TELL_SECONDS or evaluate:
            self._told = now
            value = loss.item()
            if not math.isfinite(value):
                raise DivergedError(f"the loss is {value} at step {step:,}; lower --learning-rate")
            self.tell(step=step, steps=total, loss=value)
        if evaluate:
            self.evaluate()
        if now - self._saved >= SAVE_SECONDS and step < total:
            self._saved = now
            self.save()

    def evaluate(self) -> None:
        with self.clock.paused(), self.average.in_place():
            loss = heldout_loss(
                self.training.learner.model, self.heldout, device=self.context.device, bfloat16=self.context.bfloat16
            )
        if not math.isfinite(loss):
            if self.progress.step == 0:
                raise InputError(f"the held-out loss is {loss} before the first step: the model's weights are damaged")
            raise DivergedError(f"the held-out loss is {loss} at step {self.progress.step:,}; lower --learning-rate")
        self.curve.append(
            {"step": self.progress.step, "tokens": self.progress.tokens, "kept_tokens": int(self.kept),
             "heldout_loss": loss}
        )  # fmt: skip

    def save_model(self, folder: Path) -> None:
        from safetensors import SafetensorError

        try:
            with self.average.in_place():
                self.training.learner.model.save_pretrained(folder)
                self.context.tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise SaveError(f"the model {folder} could not be saved: {error}; its run is not on record yet") from error

    def save(self) -> None:
        learner = {
            "learner": self.training.learner.state_dict(),
            "average": self.average.state_dict(),
            "curve": self.curve,
            "kept": int(self.kept),
        }
        state = TrainingState(
            self.progress, self.training.optimizer.state_dict(), learner, random_state(self.context.device)
        )
        also = None if self.training.learner.memory is None else self._save_memory
        with self.clock.paused():
            save_checkpoint(self.folder / "checkpoints", self.training.learner.model, self.context.tokenizer, state,
                            keep=1, also=also)  # fmt: skip

    def _save_memory(self, checkpoint: Path) -> None:
        memory = self.training.learner.memory
        assert memory is not None  # else nobody asks
        save_remembered(checkpoint / FILE_NAME, memory, examples=fingerprint(self.training.batches.sequences))
