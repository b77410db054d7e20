"""Compares an arm's gradient estimate with the gradient of the full loss, on held-out batches."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from torch import Tensor

from cggr_train.data import count_targets
from cggr_train.data.batches import in_order
from cggr_train.learner import Learner, build_learner
from cggr_train.session import checkpoint_activations
from cggr_train.study.arms import Arm
from cggr_train.study.context import StudyContext


def compare_gradients(context: StudyContext, arm: Arm, *, weights: Path | None, seed: int) -> dict[str, list[float]]:
    """Draw gradients of an arm and compare them with the full gradient of the same batch.

    A standard arm with a smaller batch draws that many sequences of the batch, so that the batch of equal cost is
    measured as an estimator like the others. Only full batches are used: from a shorter one, it would draw too large a
    share.

    Args:
        context: The study; its settings say how many batches and draws.
        arm: The arm; not one whose scores depend on its own run. Gradients are computed as in its steps, with the same
            micro-batches and checkpointing.
        weights: Folder of the model at which gradients are computed; None takes the start of ``seed``.
        seed: Seed of the draws.

    Returns:
        Over all draws of all batches ``cosine`` (each draw's, to the full gradient), and for each batch ``variance``
        (mean squared distance from the mean over draws) and ``bias`` (squared distance of that mean from the full
        gradient, minus its remaining variance), both divided by the full gradient's squared norm.
    """
    settings = context.settings
    train = settings.train
    batches = in_order(
        context.tokens.heldout, length=train.length, batch_size=train.batch_size,
        limit=settings.gradient_batches * train.batch_size,
    )  # fmt: skip
    whole = [batch for batch in batches if len(batch) == train.batch_size]
    model = context.model(seed, folder=weights).train()
    if arm.checkpointing:
        checkpoint_activations(model)
    found: dict[str, list[float]] = {"cosine": [], "variance": [], "bias": []}
    full = build_learner(model, "standard", arm.routing, seed=seed)
    learner = build_learner(model, arm.method, arm.routing, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for number, batch in enumerate(whole):
        truth = _gradient(context, full, batch, at_a_time=arm.forward_size, draw=0)
        drawn = _Draws(truth)
        for draw in range(settings.draws):
            rows = batch
            if arm.method == "standard" and arm.batch_size < len(batch):
                rows = batch[torch.randperm(len(batch), generator=generator)[: arm.batch_size]]
            number_of_draw = number * settings.draws + draw
            drawn.add(_gradient(context, learner, rows, at_a_time=arm.forward_size, draw=number_of_draw))
        for name, value in drawn.result().items():
            found[name] += value
    return found


def _gradient(context: StudyContext, learner: Learner, batch: Tensor, *, at_a_time: int, draw: int) -> Tensor:
    """All gradients of the model in one float32 vector ``[N]``."""
    items = float(count_targets(batch))
    for first in range(0, len(batch), at_a_time):
        rows = batch[first : first + at_a_time].to(context.device)
        with torch.autocast(context.device.type, dtype=torch.bfloat16, enabled=context.bfloat16):
            loss = learner.loss(rows, num_items=items, draw=draw, first_row=first)
        loss.backward()
    parts = []
    for parameter in learner.model.parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            parts.append((torch.zeros_like(parameter) if gradient is None else gradient).flatten().float())
            parameter.grad = None
    return torch.cat(parts)


class _Draws:
    """Sums over draws, so that single draws need not be stored."""

    def __init__(self, truth: Tensor) -> None:
        self.truth, self.square = truth, truth.double().square().sum()
        self.sum = torch.zeros_like(truth)
        self.squares: list[float] = []
        self.cosines: list[float] = []

    def add(self, gradient: Tensor) -> None:
        self.sum += gradient
        square = gradient.double().square().sum()
        self.squares.append((square / self.square).item())
        product = (gradient.double() @ self.truth.double()) / (square * self.square).sqrt().clamp(min=1e-30)
        self.cosines.append(product.item())

    def result(self) -> dict[str, list[float]]:
        draws = len(self.squares)
        mean = self.sum / draws
        mean_square = (mean.double().square().sum() / self.square).item()
        variance = max(0.0, (statistics.fmean(self.squares) - mean_square) * draws / (draws - 1))
        distance = ((mean - self.truth).double().square().sum() / self.square).item()
        return {"cosine": self.cosines, "variance": [variance], "bias": [distance - variance / draws]}
