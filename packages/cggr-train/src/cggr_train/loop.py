"""The training loop: runs until its budget of steps or seconds is spent, or until asked to stop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cggr_train.data import Batches, count_targets
from cggr_train.errors import DivergedError, InputError
from cggr_train.learner import Learner
from cggr_train.optimizer_step import OptimizerStep
from cggr_train.ranks import ALONE, Ranks
from cggr_train.recorded import RecordedStep, StepGraph


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        step: Optimizer steps done.
        tokens: Tokens seen, kept or not.
        seconds: Time spent training; evaluations and checkpoints are not counted.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Budget:
    """When training ends: after a number of steps or of seconds, whichever comes first.

    Raises:
        InputError: If neither is given, or one is not positive.
    """

    steps: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.steps is None and self.seconds is None:
            raise InputError("training needs a budget: give --steps, --seconds or both")
        for name, value in (("--steps", self.steps), ("--seconds", self.seconds)):
            if value is not None and value <= 0:
                raise InputError(f"{name} must be positive, got {value}")

    def spent(self, progress: Progress) -> float:
        """Share of the budget spent; training ends at 1."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(progress.step / self.steps)
        if self.seconds is not None:
            shares.append(progress.seconds / self.seconds)
        return max(shares)


@dataclass(frozen=True)
class LearningRate:
    """Linear warmup, then half a cosine down to ``final`` times the peak, over the share of the budget spent.

    With a budget of steps the rate is a function of the step alone and a resumed run repeats it exactly; with
    a budget of seconds it follows the clock, so that methods of different speeds all finish their decay.
    """

    peak: float
    warmup: float = 0.05
    final: float = 0.1

    def at(self, spent: float) -> float:
        """Rate when ``spent`` (in [0, 1]) of the budget is used up."""
        if spent < self.warmup:
            return self.peak * max(spent / self.warmup, 0.02)
        decay = min(1.0, (spent - self.warmup) / (1 - self.warmup))
        return self.peak * (self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * decay)))


class Clock:
    """Wall-clock time of training, excluding evaluations and checkpoints."""

    def __init__(self, device: torch.device, *, elapsed: float = 0.0) -> None:
        self.device = device
        self._elapsed = elapsed
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._elapsed + time.perf_counter() - self._started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the clock inside the block, once the work queued on an accelerator is done."""
        self._synchronize()
        self._elapsed = self.seconds
        try:
            yield
        finally:
            self._synchronize()
            self._started = time.perf_counter()

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


@dataclass(frozen=True)
class LoopSettings:
    """Optimisation settings of a run.

    Attributes:
        budget: When to end.
        learning_rate: Peak, warmup and final share.
        accumulate: Batches per optimizer step.
        clip: Largest norm of the gradient; None disables clipping.
        bfloat16: Run the forward under bfloat16 autocast.
        cuda_graph: Record the step and replay it, which requires a capturable optimizer. With ``"auto"`` the learner
            may record its passes.
    """

    budget: Budget
    learning_rate: LearningRate
    accumulate: int = 1
    clip: float | None = 1.0
    bfloat16: bool = False
    cuda_graph: StepGraph = False

    @property
    def whole_graph(self) -> bool:
        """Whether the whole step is recorded, the optimizer's update included."""
        return self.cuda_graph is True


def build_optimizer(model: torch.nn.Module, *, weight_decay: float, capturable: bool = False) -> torch.optim.AdamW:
    """AdamW with weight decay only on matrices (not on norms and biases).

    Args:
        model: Its trainable parameters are optimized.
        weight_decay: Weight decay of the matrices.
        capturable: Keep the step number on the device and update in few kernels, so that the step can be recorded.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), capturable=capturable, fused=capturable or None)


def train_steps(
    learner: Learner,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    settings: LoopSettings,
    progress: Progress,
    clock: Clock,
    *,
    on_step: Callable[[Tensor, float], None],
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> None:
    """Train until the budget is spent or ``stop()`` returns true between two steps.

    Args:
        learner: The method; its model must be on the clock's device.
        optimizer: Over the learner's parameters.
        batches: The data; step ``n`` takes batches ``n·accumulate`` and on.
        settings: Budget, learning rate, accumulation.
        progress: Updated in place, so that a checkpoint saved in ``on_step`` holds it.
        clock: Counts the training time into ``progress.seconds``.
        on_step: Called after every step with the detached loss (a tensor on the device, summed over the
            accumulated batches; the mean over all ranks is the step's) and the learning rate. Other work than training
            belongs under ``clock.paused()``.
        stop: Checked before every step.
        ranks: The processes that share the step; every rank trains on its rows of each batch.

    Raises:
        InputError: If the first step cannot be computed: an unsupported mode, NaN weights.
        DivergedError: If a later one cannot: its logits are NaN.
    """
    learner.model.train()
    # Gradients are averaged over the ranks, so each divides by its share.
    whole = settings.accumulate == 1 and ranks.size == 1
    rows = ranks.rows(batches.batch_size)
    step = OptimizerStep(
        learner, optimizer, clip=settings.clip, bfloat16=settings.bfloat16, batch_size=batches.batch_size,
        ranks=ranks,
    )  # fmt: skip
    recorded = RecordedStep(step, clock.device) if settings.whole_graph else None
    while True:
        stopping, progress.seconds = ranks.agree(stop(), progress.seconds)
        if stopping:
            break
        spent = settings.budget.spent(progress)
        if spent >= 1:
            break
        rate = settings.learning_rate.at(spent)
        first = progress.step * settings.accumulate
        numbers = range(first, first + settings.accumulate)
        read = [batches.get(number) for number in numbers]
        items = None if whole else float(sum(map(count_targets, read))) / ranks.size
        taken = [_on_device(batch[rows], clock.device) for batch in read]
        try:
            if recorded is not None:
                loss = recorded(taken, rate=rate, draw=progress.step, num_items=items)
            else:
                known = None if learner.memory is None else [batches.example_ids(number)[rows] for number in numbers]
                loss = step(taken, rate=rate, draw=progress.step, num_items=items, example_ids=known)
        except InputError as error:
            if progress.step == 0:
                raise
            number = progress.step + 1
            raise DivergedError(f"step {number:,} failed: {error}; lower --learning-rate") from error
        learner.step()
        progress.step += 1
        progress.tokens += batches.batch_size * batches.length * settings.accumulate
        _, progress.seconds = ranks.agree(False, clock.seconds)
        on_step(loss, rate)


def _on_device(batch: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        # A copy from pageable memory would make the host wait for the device.
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)
