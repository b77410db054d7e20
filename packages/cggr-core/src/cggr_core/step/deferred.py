"""Errors found on a device: raised by a later step, so that no step waits for them."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_core.checks import values_are_free
from cggr_core.collectives import sum_over_ranks
from cggr_core.monitor import Monitor
from cggr_core.schedule import Schedule
from cggr_core.step.run import StepResult


class DeferredErrors:
    """Counts of bad labels and NaN, and the confidence that changes the ratio, in transfer from the device."""

    def __init__(self) -> None:
        self._monitor = Monitor()

    def post(self, result: StepResult, schedule: Schedule) -> None:
        """Start the transfer of what a step found.

        Raises:
            ValueError: If the loss is NaN and reading it costs nothing.
        """
        loss = result.loss
        if values_are_free(loss) and bool(loss.isnan()):
            raise ValueError(
                "the loss is NaN: logits are NaN or infinite at a kept token, or a token_weight is NaN; look for an "
                "overflow or a bad learning rate before this step"
            )
        self.send(findings(result, schedule))

    def send(self, found: Tensor) -> None:
        """Start the transfer of a step's :func:`findings`."""
        self._monitor.post(found)

    def raise_deferred_errors(
        self, schedule: Schedule, *, vocab_size: int, ignore_index: int, wait: bool = False
    ) -> None:
        """Raise what an earlier step found, or pass its confidence to the schedule.

        Args:
            schedule: Of the steps.
            vocab_size: For the error.
            ignore_index: The same.
            wait: Wait for the device.

        Raises:
            ValueError: If labels were outside the vocabulary, logits were NaN, or the loss was.
        """
        found = self._monitor.read(wait=wait)
        if found is None:
            return
        invalid, nan, confidence = found
        if invalid:
            raise ValueError(
                f"labels of the last step had {int(invalid)} value(s) outside [0, {vocab_size}) that are "
                f"not ignore_index={ignore_index}; they were not counted"
            )
        if nan:
            where = f"the logits of the last step were NaN at {int(nan)} tokens" if nan > 0 else "the last loss was NaN"
            raise ValueError(f"{where}; look for an overflow or too high a learning rate before that step")
        if confidence == confidence:
            schedule.observe(confidence)


def findings(result: StepResult, schedule: Schedule) -> Tensor:
    """Labels outside the vocabulary, tokens with NaN logits (-1 for some), and the confidence: float32 ``[3]``."""
    loss, targets, statistics = result.loss, result.targets, result.scores.statistics
    # Without statistics the number of tokens is unknown: -1 means "some".
    nan = -loss.detach().isnan().long()
    confidence = torch.full((), torch.nan, device=targets.invalid.device)
    if statistics is not None:
        found = next(value for value in statistics[:-1] if value is not None)
        count = (found.isnan() & targets.countable).sum()
        nan = torch.where(count > 0, count, nan)
        if schedule.reads_confidence:
            # Over all ranks, so that they continue with the same ratio.
            count = result.metrics["countable_tokens"]
            total = sum_over_ranks(torch.stack([result.metrics["confidence"] * count, count.float()]))
            confidence = total[0] / total[1]
    return torch.stack([targets.invalid.float(), nan.float(), confidence])
