"""Reading a language-model head: statistics of all tokens, losses of the kept ones."""

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cggr_core.linear_loss import linear_cross_entropy
from cggr_core.statistics import TokenStatistics, linear_token_statistics, token_statistics

if TYPE_CHECKING:
    from cggr_core.routing.heads import Head

# 1 GiB of bfloat16: far less than the activations that a step holds when its loss is computed.
_MAX_LOGITS = 2**29


class HeadReadout:
    """Statistics and losses through one head, without a logits tensor if the head is one matrix.

    Args:
        head: The head.
        ignore_index: Target that is not counted.
    """

    def __init__(self, head: "Head", *, ignore_index: int) -> None:
        self._head = head
        self._ignore_index = ignore_index

    @property
    def fused(self) -> bool:
        """Whether hidden states suffice; otherwise the model's own logits are read."""
        return self._head.fused

    @torch.no_grad()
    def statistics(
        self, values: Tensor, targets: Tensor | None, *, fields: Collection[str], precision: str | None = None
    ) -> TokenStatistics:
        """Statistics of every token.

        Args:
            values: The head's input ``[B, S, H]`` if ``fused``, else logits ``[B, S, V]``.
            targets: int64 ``[B, S]``, or ``None`` for the statistics that need none.
            fields: Statistics that are needed.
            precision: As in :func:`~cggr_core.linear_token_statistics`, if ``fused``.

        Returns:
            float32 ``[B, S]`` each.
        """
        if not self.fused:
            return token_statistics(values, targets, ignore_index=self._ignore_index, fields=fields)
        module = self._head.linear
        return linear_token_statistics(
            values,
            module.weight,
            targets,
            bias=module.bias,
            softcap=self._head.softcap,
            scale=self._head.scale,
            ignore_index=self._ignore_index,
            fields=fields,
            precision=precision,
        )

    def weighted_loss(self, values: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
        """``sum(coefficients * nll)`` with gradients.

        Args:
            values: The head's input ``[..., H]`` if ``fused``, else logits ``[..., V]``.
            targets: int64 ``[...]``.
            coefficients: float32 ``[...]``; 0 for tokens that do not count.

        Returns:
            float32 scalar.
        """
        targets = torch.where(coefficients != 0, targets, self._ignore_index).flatten()
        if not self.fused:
            # Guards against NaN in rows that do not count: the softmax of NaN times a gradient of 0 is NaN.
            logits = values.flatten(0, -2).float().masked_fill((targets == self._ignore_index)[:, None], 0.0)
            nll = nn.functional.cross_entropy(logits, targets, ignore_index=self._ignore_index, reduction="none")
            return (nll * coefficients.flatten()).sum()
        module = self._head.linear
        return linear_cross_entropy(
            values.flatten(0, -2),
            module.weight,
            targets,
            row_weight=coefficients.flatten(),
            bias=module.bias,
            softcap=self._head.softcap,
            scale=self._head.scale,
            ignore_index=self._ignore_index,
            max_logits=_MAX_LOGITS,
        )
