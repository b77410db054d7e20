"""One run of a study: an arm, a seed, a number of steps, and held-out losses along the way."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cggr_train.checkpoint import latest_checkpoint
from cggr_train.errors import DivergedError, InputError, SaveError
from cggr_train.exact_match import exact_match
from cggr_train.study.arms import Arm
from cggr_train.study.average import RunningAverage
from cggr_train.study.context import StudyContext

if TYPE_CHECKING:
    from cggr_train.loop import Progress
    from cggr_train.session import RunSession

TELL_SECONDS, SAVE_SECONDS = 1.0, 60.0
ROUTER_METRICS = ("router_correlation", "remembered", "score_age_epochs")
"""For learned routers and remembered scores: how well they predict the scores, and how old those are."""


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
    accuracy_at: Mapping[str, int] | None = None,
    tuning: bool = False,
) -> dict[str, Any] | None:
    """Train up to the last of ``points``, or continue an interrupted run of the same arm and seed.

    Args:
        context: The study.
        arm: How to train.
        seed: Of weights, data order and selections.
        points: Steps after which the averaged weights are evaluated on the held-out batches, ascending.
        warmup_steps: Steps over which the learning rate warms up.
        eval_sequences: Held-out sequences of an evaluation.
        save_model: Save the averaged weights at the end.
        tell: Called about once a second with ``step``, ``steps`` and ``loss``.
        stop: Checked before every step; a stopped run saves a checkpoint.
        accuracy_at: The ``points`` at which the held-out questions are answered, by name; None asks none.
        tuning: The run only tries a learning rate: it is evaluated on the sequences for choosing rates.

    Returns:
        ``points`` (each with ``step``, ``tokens``, ``kept_tokens`` and ``heldout_loss`` in nats per token), ``engine``,
        ``router`` (:data:`ROUTER_METRICS` of the last step), ``train_seconds`` (time of all steps, with other runs in
        parallel), and ``accuracy`` (by name, ``right`` and ``questions``) if requested; None if it was stopped. For a
        run that diverged: ``points`` up to there, ``diverged`` (the step) and ``reason``.

    Raises:
        SaveError: If a checkpoint cannot be written.
    """
    name = f"{arm.name}-rate{arm.learning_rate:g}" if tuning else f"{arm.name}-seed{seed}"
    folder = context.folder / "runs" / name
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = latest_checkpoint(folder / "checkpoints")
    session = context.session(
        arm, seed, steps=points[-1], warmup_steps=warmup_steps, eval_sequences=eval_sequences, weights=checkpoint,
        tuning=tuning,
    )  # fmt: skip
    run = _Run(context, session, folder, tell, accuracy_at or {})
    if checkpoint is not None:
        run.resume(checkpoint)
    if session.progress.step == 0 and not run.curve:
        run.evaluate()
    remaining = frozenset(points)

    def on_step(loss: torch.Tensor, rate: float) -> None:
        run.after_step(loss, total=points[-1], evaluate=session.progress.step in remaining)

    try:
        session.train(on_step, stop=stop)
    except DivergedError as error:
        shutil.rmtree(folder)
        return {"points": run.curve, "diverged": session.progress.step, "reason": str(error)}
    if session.progress.step < points[-1]:
        run.save()
        return None
    if save_model:
        run.save_model(folder / "model")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if not save_model:
        folder.rmdir()
    return {
        "points": run.curve,
        "engine": str(session.learner.metrics.get("engine", "")),
        "router": {name: float(value) for name, value in session.learner.metrics.items() if name in ROUTER_METRICS},
        "train_seconds": session.progress.seconds,
        **({"accuracy": run.accuracy} if run.accuracy else {}),
    }


class _Run:
    """What a study does around the steps of a session: average the weights, evaluate, save, report."""

    def __init__(
        self, context: StudyContext, session: RunSession, folder: Path, tell: Callable[..., None],
        accuracy_at: Mapping[str, int],
    ) -> None:  # fmt: skip
        self.context, self.session, self.folder, self.tell = context, session, folder, tell
        self.accuracy_at = accuracy_at
        self.average = RunningAverage(session.model)
        self.curve: list[dict[str, Any]] = []
        self.accuracy: dict[str, dict[str, int]] = {}
        # on the device, so that counting does not wait for it
        self.kept = torch.zeros((), dtype=torch.int64, device=session.device)
        self._told = self._saved = time.monotonic()

    @property
    def progress(self) -> Progress:
        return self.session.progress

    def resume(self, checkpoint: Path) -> None:
        state = self.session.resume(checkpoint)
        self.average.load_state_dict(state["average"])
        self.curve, self.accuracy = state["curve"], state["accuracy"]
        self.kept.fill_(state["kept"])

    def after_step(self, loss: torch.Tensor, *, total: int, evaluate: bool) -> None:
        step = self.progress.step
        self.average.update(step)
        self.kept += self.session.learner.metrics["kept_tokens"]
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
        loss = self.session.evaluate(weights=self.average.average_parameters())
        if not math.isfinite(loss):
            if self.progress.step == 0:
                raise InputError(f"the held-out loss is {loss} before the first step: the model's weights are damaged")
            raise DivergedError(f"the held-out loss is {loss} at step {self.progress.step:,}; lower --learning-rate")
        self.curve.append(
            {"step": self.progress.step, "tokens": self.progress.tokens, "kept_tokens": int(self.kept),
             "heldout_loss": loss}
        )  # fmt: skip
        names = [name for name, step in self.accuracy_at.items() if step == self.progress.step]
        if names:
            self.accuracy |= dict.fromkeys(names, self.answer())

    def answer(self) -> dict[str, int]:
        """Answer every held-out question with the averaged weights."""
        context, train = self.context, self.context.settings.train
        rows = torch.from_numpy(context.tokens.heldout.reshape(-1, train.length).astype("int64"))
        with self.session.clock.paused(), self.average.average_parameters():
            found = exact_match(
                self.session.model, rows[: context.settings.questions], context.tokenizer,
                after=context.settings.answer_after, device=context.device, bfloat16=context.bfloat16,
            )  # fmt: skip
        return found._asdict()

    def save_model(self, folder: Path) -> None:
        from safetensors import SafetensorError

        try:
            with self.average.average_parameters():
                self.session.model.save_pretrained(folder)
                self.context.tokenizer.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            raise SaveError(f"the model {folder} could not be saved: {error}; its run has not been recorded") from error

    def save(self) -> None:
        extra = {
            "average": self.average.state_dict(),
            "curve": self.curve,
            "kept": int(self.kept),
            "accuracy": self.accuracy,
        }
        self.session.save(self.folder / "checkpoints", self.context.tokenizer, keep=1, extra=extra)
