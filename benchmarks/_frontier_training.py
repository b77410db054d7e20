"""Steps and runs of `benchmarks.frontier`: the same optimizer, clipping, data order and averaging for every way."""

from __future__ import annotations

import copy
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks._frontier_arms import Arm, Setting, Way
from benchmarks._frontier_data import Rows
from benchmarks._frontier_units import keep_part, route_layers
from cggr_core import CGGRModel, Selection
from cggr_core.routing import fused_forwards, replaced_forwards
from cggr_train.data import IGNORED, Batches, count_targets, split_supervised
from cggr_train.errors import RunError
from cggr_train.loop import build_optimizer
from cggr_train.optimizer_step import OptimizerStep
from cggr_train.recorded import RecordedStep
from cggr_train.study.average import RunningAverage

CLIP, WEIGHT_DECAY, WARMUP = 1.0, 0.01, 5
TIMED = 8
MOST_BEFORE = 10.0
"""Seconds for self-recording steps to settle before they are timed."""
EVAL_BATCH = 32

Take = Callable[..., Tensor]


def checkpoint(model: Any) -> None:
    """Recompute activations in the backward pass, without the random state, which cannot be read while recording."""
    given = {"use_reentrant": False, "preserve_rng_state": False}
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given)
    else:
        enable(activation_checkpointing_kwargs=given)


class Learner:
    """A way of training over a model, as :class:`cggr_train.optimizer_step.OptimizerStep` sees one.

    Args:
        model: On its device; trained in place.
        way: The way.
        slots: Slots per row, if the kept tokens follow from the labels.
        seed: Of the selections.
        records_itself: Leave the choice of tokens and the recording of steps to ``CGGRModel``.
        steps_of_epoch: Steps per epoch, if kept tokens depend on the epoch.
        ends: Tokens that end a line, if sentences are kept; see :func:`benchmarks._frontier_units.line_ends`.
    """

    memory = None

    def __init__(
        self, model: Any, way: Way, *, slots: int, seed: int, records_itself: bool = False, steps_of_epoch: int = 1,
        ends: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.model: Any = model
        self.way, self.slots = way, -(-slots // way.parts) + way.margin
        self.records_itself = records_itself
        self.steps_of_epoch, self.ends = steps_of_epoch, ends
        self._looked, self._kept = False, None  # only some of the layers route
        if way.mixed:
            route_layers(model.model.layers, way.layers, lambda: self._kept)
        gradient = "exact" if way.mixed else way.gradient
        self.routed = CGGRModel(
            model, gradient=gradient, selection=way.selection, min_tokens_ratio=way.ratio, block_size=way.block,
            context_margin=way.margin, seed=seed, cuda_graph="auto" if records_itself else False,
        )  # fmt: skip
        self.wrapped: nn.Module = self.routed
        self._fused = ExitStack()
        if gradient == "exact":  # routed passes run the fused layers anyway
            self._fused.enter_context(replaced_forwards(fused_forwards(model.modules())))

    def loss(self, rows: Tensor, *, draw: int | Tensor | None = None, first_row: int = 0, **items: Any) -> Tensor:
        """Of rows ``[B, S]``; ``items`` may say by how many ``num_items`` it is divided."""
        input_ids, labels = split_supervised(rows)
        given, way = dict(items), self.way
        if way.given and not self.records_itself:
            kept = predicts = functional.pad(labels[:, 1:] != IGNORED, (0, 1))
            if way.parts > 1:
                epoch = (0 if draw is None else draw) // self.steps_of_epoch
                targets = functional.pad(input_ids[:, 1:], (0, 1))
                kept = keep_part(predicts, targets, unit=way.unit, parts=way.parts, ends=self.ends, epoch=epoch)
            given["selection"] = Selection.from_mask(kept, countable=predicts, capacity=self.slots, margin=way.margin)
            if way.mixed:
                return self._mixed(kept, input_ids=input_ids, labels=labels, **given)
        else:
            given |= {"draw": draw, "first_row": first_row}
        return self.routed(input_ids, labels=labels, **given)

    def _mixed(self, kept: Tensor, **given: Any) -> Tensor:
        if not self._looked:  # CGGRModel checks a model before its first step, on rows of its own
            self.routed(**given)
            self._looked = True
        self._kept = kept
        try:
            return self.routed(**given)
        finally:
            self._kept = None


class Steps:
    """A run's steps.

    Args:
        base: The initial model of every run; copied.
        way: How to train.
        rows: Training rows, int64 ``[N, S]``.
        setting: Of the rows.
        seed: Of the data's order and of selections.
        rate: Learning rate, constant after :data:`WARMUP` steps of warm-up.
        micro_batch: Sequences per forward; None for the whole batch.
        checkpointing: Whether activations are recomputed.
        recorded: Whether the whole optimizer step is one CUDA graph, after a few eager ones.
        records_itself: See :class:`Learner`.
        ends: See :class:`Learner`.
    """

    def __init__(
        self, base: nn.Module, way: Way, rows: Tensor, setting: Setting, *, seed: int, rate: float,
        micro_batch: int | None = None, checkpointing: bool = False, recorded: bool = False,
        records_itself: bool = False, ends: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.model: Any = copy.deepcopy(base).train()
        if checkpointing:
            checkpoint(self.model)
        torch.manual_seed(seed)
        self.device = next(self.model.parameters()).device
        self.way, self.rate, self.number = way, rate, 0
        micro = micro_batch or way.batch
        self.batches = Batches(rows.flatten().numpy(), length=setting.length, batch_size=micro, seed=seed)
        self.accumulate = way.batch // micro
        learner: Any = Learner(
            self.model, way, slots=setting.slots, seed=seed, records_itself=records_itself,
            steps_of_epoch=max(1, self.batches.num_sequences // way.batch),
            ends=None if ends is None else ends.to(self.device),
        )  # fmt: skip
        self.learner = learner
        cuda = self.device.type == "cuda"
        optimizer = build_optimizer(self.model, weight_decay=WEIGHT_DECAY, capturable=cuda)
        step = OptimizerStep(learner, optimizer, clip=CLIP, bfloat16=cuda, batch_size=micro)
        self._take: Take = RecordedStep(step, self.device) if recorded and cuda else step

    def take(self) -> Tensor:
        """Take a step, and return its loss."""
        first = self.number * self.accumulate
        read = [self.batches.get(number) for number in range(first, first + self.accumulate)]
        items = float(sum(map(count_targets, read))) if self.accumulate > 1 else None
        batches = [_on_device(batch, self.device) for batch in read]
        rate = self.rate * min(1.0, (self.number + 1) / WARMUP)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
            loss = self._take(batches, rate=rate, draw=self.number, num_items=items)
        self.number += 1
        return loss


def _on_device(batch: Tensor, device: torch.device) -> Tensor:
    return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch


def wait(device: torch.device) -> None:
    """For everything that is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(steps: Steps, count: int) -> float:
    """Of a step, as the mean of ``count`` in a row."""
    wait(steps.device)
    began = time.perf_counter()
    for _ in range(count):
        steps.take()
    wait(steps.device)
    return (time.perf_counter() - began) / count


def release(device: torch.device) -> None:
    """Free the memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def time_arm(
    base: nn.Module, rows: Rows, setting: Setting, arm: Arm, *, itself: bool = True, ends: Tensor | None = None
) -> dict[str, Any]:
    """Seconds and peak memory of a step: eager, recorded as a whole, and recorded by ``CGGRModel`` itself.

    Returns:
        ``eager``, ``recorded`` and ``itself``, each with ``seconds`` and ``peak_bytes``, or the reason why there are
        none.
    """
    device = next(base.parameters()).device
    way = setting.ways[arm.way]
    fitted: dict[str, Any] = {
        "seed": 0, "rate": 0.0, "micro_batch": arm.micro_batch, "checkpointing": arm.checkpointing,
        "ends": ends,
    }  # fmt: skip
    found: dict[str, Any] = {}

    def measured(before: int, count: int, most: float = 60.0, **how: Any) -> dict[str, Any]:
        release(device)
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0  # by the model that the steps copy
        steps = Steps(base, way, rows.train, setting, **fitted, **how)
        began = time.perf_counter()
        while steps.number < before and time.perf_counter() - began < most:
            steps.take()
            wait(device)
        told: dict[str, Any] = {"before": steps.number, "seconds_before": time.perf_counter() - began}
        if how.get("records_itself"):  # one by one, since a new number of slots is recorded in between
            told["seconds"] = statistics.median(seconds_of(steps, 1) for _ in range(2 * count))
        else:
            told["seconds"] = seconds_of(steps, count)
        if device.type == "cuda":
            told["peak_bytes"] = torch.cuda.max_memory_allocated(device) - held
        return told

    plans: dict[str, tuple[int, int, dict[str, Any]]] = {"eager": (2, 3, {})}
    if device.type == "cuda":
        plans["recorded"] = (4, TIMED, {"recorded": True})
        if itself and setting.itself and not (arm.checkpointing or arm.micro_batch or way.late):
            settled = {"records_itself": True, "most": MOST_BEFORE}
            plans["itself"] = (24 if way.given else 6, TIMED, settled)
    for name, (before, count, how) in plans.items():
        try:
            found[name] = measured(before, count, **how)
        except (RunError, RuntimeError, torch.OutOfMemoryError) as error:
            found[name] = {"reason": str(error).strip().splitlines()[0][:200]}
    release(device)
    return found


@torch.no_grad()
def loss_on(model: Any, rows: Tensor) -> float:
    """Mean negative log-likelihood of the supervised tokens of ``rows``, nats; the head runs only on these."""
    device = next(model.parameters()).device
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in rows.split(EVAL_BATCH):
        input_ids, labels = split_supervised(batch.to(device))
        predicts = labels[:, 1:] != IGNORED
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state[:, :-1][predicts]
            logits = model.lm_head(hidden).float()
        total += functional.cross_entropy(logits, labels[:, 1:][predicts], reduction="sum").double()
        count += len(logits)
    model.train()
    return total.item() / count


def train(
    base: nn.Module, rows: Rows, setting: Setting, way: Way, *, seed: int, rate: float, points: Sequence[int],
    eval_rows: int, recorded: bool, micro_batch: int | None = None, checkpointing: bool = False, tuning: bool = False,
    keep: Mapping[int, Callable[[Any], None]] | None = None, ends: Tensor | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train up to the last of ``points``, and evaluate the averaged weights on held-out rows at each.

    Args:
        base: The initial model.
        rows: Of the setting.
        setting: The setting.
        way: How to train.
        seed: Of the data's order and of selections.
        rate: Learning rate.
        points: Steps, ascending.
        eval_rows: Held-out rows.
        recorded: Whether steps are recorded.
        micro_batch: See :class:`Steps`.
        checkpointing: See :class:`Steps`.
        tuning: Evaluate on the rows for choosing learning rates.
        keep: Called with the averaged model at some of ``points``.
        ends: See :class:`Learner`.

    Returns:
        ``points`` (``step`` and ``loss`` each), ``seconds`` in all.
    """
    began = time.perf_counter()
    steps = Steps(
        base, way, rows.train, setting, seed=seed, rate=rate, recorded=recorded, micro_batch=micro_batch,
        checkpointing=checkpointing, ends=ends,
    )  # fmt: skip
    average = RunningAverage(steps.model)
    chosen = torch.linspace(0, len(rows.test) - 1, min(eval_rows, len(rows.test))).round().long()
    heldout = rows.tuning if tuning else rows.test[chosen]
    curve: list[dict[str, float]] = []
    while steps.number < points[-1]:
        loss = steps.take()
        average.update(steps.number)
        if steps.number in points:
            if not bool(loss.isfinite()):
                return {"points": curve, "diverged": steps.number}
            with average.average_parameters():
                curve.append({"step": steps.number, "loss": loss_on(steps.model, heldout)})
                if keep and steps.number in keep:
                    keep[steps.number](steps.model)
    return {"points": curve, "seconds": time.perf_counter() - began}
