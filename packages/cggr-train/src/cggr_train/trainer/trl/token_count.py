"""The tokens that SFTTrainer has trained on, counted for steps whose loss is not its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


class TokenCount:
    """Counts on the device, and gives TRL the total before it logs: ``num_tokens`` and ``eval_num_tokens``.

    Args:
        trainer: An SFTTrainer.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._new: Tensor | None = None

    def add(self, inputs: Mapping[str, Any]) -> None:
        """Count the tokens of a batch, without its padding."""
        mask = inputs.get("attention_mask")
        count = torch.tensor(inputs["labels"].numel(), device=inputs["labels"].device) if mask is None else mask.sum()
        self._new = count if self._new is None else self._new + count

    def report(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Add what was counted to TRL's total; synchronises with the device if anything was.

        Args:
            reduce: Sums a tensor over all ranks.
        """
        if self._new is None:
            return
        trainer = self._trainer
        trainer._total_train_tokens += int(reduce(self._new))
        trainer._metrics["train"]["num_tokens"] = [trainer._total_train_tokens]
        self._new = None
