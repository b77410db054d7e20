"""One optimizer step: the gradient of all its batches, clipped, and the update of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cggr_train.learner import Learner
from cggr_train.ranks import ALONE, Ranks, without_averaging


class OptimizerStep:
    """A step as a function of only its batches, learning rate and number.

    The host reads nothing, so the whole step can be recorded, see :class:`cggr_train.recorded.RecordedStep`.

    Args:
        learner: The method.
        optimizer: Over the learner's parameters.
        clip: Largest norm of the gradient; None leaves it as it is.
        bfloat16: Run the forward under bfloat16 autocast.
        batch_size: Rows of each batch, of all ranks together.
        ranks: The processes that share the step.
    """

    def __init__(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        *,
        clip: float | None,
        bfloat16: bool,
        batch_size: int,
        ranks: Ranks = ALONE,
    ) -> None:
        self.learner, self.optimizer = learner, optimizer
        self._clip, self._bfloat16 = clip, bfloat16
        self._batch_size, self._ranks = batch_size, ranks
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def __call__(
        self,
        batches: Sequence[Tensor],
        *,
        rate: float | Tensor,
        draw: int | Tensor,
        num_items: float | Tensor | None,
        example_ids: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Run the step.

        Args:
            batches: This rank's rows of each accumulated batch, int64 ``[B, S]`` on the model's device.
            rate: Learning rate; a tensor (0-dim, on the device) if the optimizer is capturable.
            draw: Number of the step's random choices; a tensor (0-dim int64, on the device) if it is recorded.
            num_items: Supervised tokens to divide by (a 0-dim tensor if the step is recorded); None divides by the
                batch's own.
            example_ids: int64 ``[B]`` of each batch, if scores are remembered by example.

        Returns:
            The detached loss, summed over the batches; float32 scalar on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total: Tensor | None = None
        for micro, input_ids in enumerate(batches):
            known = {} if example_ids is None else {"example_ids": example_ids[micro]}
            first_row = micro * self._batch_size + self._ranks.rows(self._batch_size).start
            with without_averaging(self.learner.wrapped, last=micro == len(batches) - 1):
                with torch.autocast(input_ids.device.type, dtype=torch.bfloat16, enabled=self._bfloat16):
                    loss = self.learner.loss(input_ids, num_items=num_items, draw=draw, first_row=first_row, **known)
                loss.backward()
            total = loss.detach() if total is None else total + loss.detach()
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        assert total is not None  # a step has at least one batch
        return total
