"""Metrics accumulated on the device between log records and read once per record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Each per-token mean, with the metric that holds its number of tokens.
_MEANS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "score_kept": lambda metrics: metrics["kept_tokens"],
    "score_dropped": lambda metrics: metrics["countable_tokens"] - metrics["kept_tokens"],
    "gradnorm_kept": lambda metrics: metrics["countable_tokens"],
    "full_loss": lambda metrics: metrics["countable_tokens"],
}
_COUNTS = ("kept_tokens", "countable_tokens", "rows_skipped")
_FOLD_AFTER = 256


class MetricsWindow:
    """Accumulates the metrics of training forwards.

    A forward only stores references to tensors that exist anyway; they are summed on their device when they are read,
    or every 256 forwards.
    """

    def __init__(self) -> None:
        self._waiting: list[dict[str, Tensor]] = []
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Any]) -> None:
        """Record the metrics of one forward; see :attr:`cggr_core.CGGRModel.metrics`."""
        self._waiting.append({name: metrics[name] for name in (*_COUNTS, *_MEANS) if name in metrics})
        if len(self._waiting) == _FOLD_AFTER:
            self._add_to_sums()

    def read(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """The metrics since the last call, as numbers; synchronises with the device once.

        Args:
            reduce: Sums a float64 tensor ``[n]`` over all ranks.

        Returns:
            The totals ``kept_tokens`` and ``countable_tokens``, ``keep_ratio``, ``rows_skipped`` where rows can be
            skipped, and the per-token means ``score_kept``, ``score_dropped``, ``gradnorm_kept`` and ``full_loss``
            where they are known; empty if there was no forward.
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
