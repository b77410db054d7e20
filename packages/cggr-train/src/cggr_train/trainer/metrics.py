"""What the steps since the last log record did, added up on the device and read once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# A metric that is a mean over tokens, and the number of tokens that it is a mean over.
_MEANS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "score_kept": lambda metrics: metrics["kept_tokens"],
    "score_dropped": lambda metrics: metrics["countable_tokens"] - metrics["kept_tokens"],
    "gradnorm_kept": lambda metrics: metrics["countable_tokens"],
    "full_loss": lambda metrics: metrics["countable_tokens"],
}
_COUNTS = ("kept_tokens", "countable_tokens", "rows_skipped")
_FOLD_AFTER = 256


class MetricsWindow:
    """Adds up the metrics of training forwards.

    A forward costs no more than keeping references to numbers that exist anyway; they are added up when they are read
    (or every 256 forwards), on their device.
    """

    def __init__(self) -> None:
        self._waiting: list[dict[str, Tensor]] = []
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Any]) -> None:
        """Take note of the metrics of one forward; see :attr:`cggr_core.CGGRModel.metrics`."""
        self._waiting.append({name: metrics[name] for name in (*_COUNTS, *_MEANS) if name in metrics})
        if len(self._waiting) == _FOLD_AFTER:
            self._add_to_sums()

    def read(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Everything since the last reading, as numbers; one wait for the device.

        Args:
            reduce: Adds a float64 tensor ``[n]`` up over all ranks.

        Returns:
            ``kept_tokens`` and ``countable_tokens`` in all, ``keep_ratio``, ``rows_skipped`` where rows can be, and
            the means over tokens of ``score_kept``, ``score_dropped``, ``gradnorm_kept`` and ``full_loss`` where they
            are known; nothing if there was no forward.
        """
        self._add_to_sums()
        sums, self._sums = self._sums, {}
        if not sums:
            return {}
        numbers = dict(zip(sums, reduce(torch.stack(list(sums.values()))).tolist(), strict=True))
        kept, countable = numbers["kept_tokens"], numbers["countable_tokens"]
        found = {"keep_ratio": kept / max(countable, 1), "kept_tokens": kept, "countable_tokens": countable}
        if "rows_skipped" in numbers:
            found["rows_skipped"] = numbers["rows_skipped"]
        for name, tokens in _MEANS.items():
            if name in numbers and tokens(numbers):
                found[name] = numbers[name] / tokens(numbers)
        return found

    def _add_to_sums(self) -> None:
        if not self._waiting:
            return
        columns = {name: torch.stack([row[name] for row in self._waiting]).double() for name in self._waiting[0]}
        self._waiting.clear()
        for name, tokens in _MEANS.items():
            if name in columns:
                columns[name] = columns[name] * tokens(columns)
        for name, column in columns.items():
            total = column.sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
