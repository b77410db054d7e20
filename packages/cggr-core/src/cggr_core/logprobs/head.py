"""Log-probabilities through a model's own head, at a temperature."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cggr_core.head import accumulation_dtype
from cggr_core.logprobs.linear import linear_logprobs, logits_logprobs
from cggr_core.statistics import linear_token_statistics, token_statistics

if TYPE_CHECKING:
    from cggr_core.routing.heads import Head

__all__ = ["TokenHead"]


class TokenHead:
    """A language-model head at a temperature, without a logits tensor if the head is one matrix.

    Args:
        head: The head.
        temperature: What the logits are divided by.
    """

    def __init__(self, head: Head, temperature: float) -> None:
        self._head = head
        self._temperature = temperature
        # softcap * tanh(scale * x / softcap) / T is the same form with both divided by T.
        scale = 1.0 if head.scale is None else head.scale
        self._scale = None if scale == temperature else scale / temperature
        self._softcap = None if head.softcap is None else head.softcap / temperature

    def logprobs(self, values: Tensor, targets: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """With gradients.

        Args:
            values: The head's input ``[..., H]`` if the head is one matrix, else logits ``[..., V]``.
            targets: int64 ``[...]``; -100 for ignored rows, which get 0 and no gradient.
            entropy: Whether to compute the entropies.

        Returns:
            Log-probabilities and entropies ``[...]``.
        """
        rows, flat = values.flatten(0, -2), targets.flatten()
        if self._head.fused:
            module = self._head.linear
            found = linear_logprobs(
                rows,
                module.weight,
                flat,
                entropy=entropy,
                bias=module.bias,
                softcap=self._softcap,
                scale=self._scale,
            )
        else:
            found = logits_logprobs(rows.to(accumulation_dtype(rows.dtype)) / self._temperature, flat)
        logprob, spread = (None if part is None else part.view(targets.shape) for part in found)
        assert logprob is not None
        return logprob, spread if entropy else None

    @torch.no_grad()
    def constants(self, values: Tensor, targets: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """:meth:`logprobs` without gradients, in chunks."""
        fields = {"nll", "entropy"} if entropy else {"nll"}
        if self._head.fused:
            module = self._head.linear
            statistics = linear_token_statistics(
                values,
                module.weight,
                targets,
                bias=module.bias,
                softcap=self._softcap,
                scale=self._scale,
                fields=fields,
            )
        else:
            statistics = token_statistics(values / self._temperature, targets, fields=fields)
        assert statistics.nll is not None  # asked for
        return 0.0 - statistics.nll, statistics.entropy
