"""Losses that train on the kept tokens of a batch, from logits or from hidden states and a head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.checks import check_float, check_targets
from cggr_core.coefficients import all_coefficients, loss_coefficients
from cggr_core.head import accumulation_dtype, check_head, has_flat_rows
from cggr_core.linear_loss import linear_cross_entropy
from cggr_core.statistics import linear_token_statistics, token_statistics
from cggr_core.token_loss import TokenLoss, check_per_token, with_row

__all__ = ["CGGRLinearLoss", "CGGRLoss"]


class CGGRLoss(TokenLoss):
    """Cross-entropy on the kept tokens of a batch of logits.

    In training mode it estimates the mean cross-entropy over all countable tokens from the kept ones, with a zero
    gradient everywhere else; in eval mode it returns the mean itself. With a ratio of 1 it equals
    ``torch.nn.functional.cross_entropy``. If nothing is countable, it is a zero that is connected to the graph.

    Under ``torch.compile`` one graph serves every step once the warmup is over; during it each new ratio recompiles.

    The host reads nothing in a step. On CPU, targets outside the vocabulary and NaN logits raise at once. On other
    devices they are counted there (and such targets ignored), and the next forward that sees the count raises.

    Args:
        scoring: What makes a token worth learning from, see :func:`~cggr_core.score`.
        selection: How tokens are chosen, see :func:`~cggr_core.select`. The ratio holds over the whole batch.
        num_strata: Score buckets of ``"stratified"``.
        min_tokens_per_sequence: Minimum number of kept tokens per row for ``"sequence_aware"``.
        dynamic_threshold: Adapt the ratio to the confidence of the previous batch, see :class:`~cggr_core.Schedule`;
            reads one value per step from the device. Has no effect under ``torch.compile``.
        threshold_sensitivity: How strongly the confidence changes the ratio.
        min_tokens_ratio: Keep ratio in (0, 1], after the warmup.
        warmup_steps: Steps over which the ratio falls from 1 to ``min_tokens_ratio``; call :meth:`step`.
        block_size: Choose blocks of this many neighbouring tokens.
        unbiased: Weight kept tokens by 1 / inclusion probability.
        seed: Seed of the random choices, at least 0.
        ignore_index: Target that is never scored, kept or counted.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If a name or a number is not accepted.

    Example:
        >>> criterion = CGGRLoss(min_tokens_ratio=0.25)
        >>> logits = torch.randn(2, 8, 16, requires_grad=True)
        >>> criterion(logits, torch.randint(0, 16, (2, 8))).backward()
        >>> int(criterion.metrics["kept_tokens"])
        4
    """

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        *,
        token_weight: Tensor | None = None,
        reference_nll: Tensor | None = None,
        num_items: Tensor | float | None = None,
        draw: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of the kept tokens.

        Args:
            logits: [B, S, V] or [N, V].
            targets: Class indices, [B, S] or [N], aligned: the target at t is what the logits at t predict.
            token_weight: Factor on each token's loss, shape of ``targets``.
            reference_nll: A reference model's nll of each token in nats, shape of ``targets``, for "excess".
            num_items: What the sum is divided by; None for the countable tokens of this batch.
            draw: Number of the random draw; None counts up. A 0-dim int64 tensor that is incremented in place lets a
                captured graph make a new selection at every replay.

        Returns:
            0-dim float32.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape, device or (on CPU) a value is wrong.
        """
        check_float("logits", logits)
        if logits.dim() not in (2, 3) or logits.shape[-1] == 0:
            raise ValueError(f"logits must be [B, S, V] or [N, V], got shape {tuple(logits.shape)}")
        V = logits.shape[-1]
        targets = check_targets("targets", targets, logits.shape[:-1], V, self.settings.ignore_index, logits, "logits")
        check_per_token(targets, token_weight=token_weight, reference_nll=reference_nll)
        self._begin()
        if logits.dim() == 2:
            logits, targets = logits[None], targets[None]
            token_weight, reference_nll = with_row(token_weight), with_row(reference_nll)
        targets, bad = self._targets(targets, V)
        countable = targets != self.settings.ignore_index
        if not self.training:
            coefficients = all_coefficients(countable, token_weight, num_items)
            return self._loss(logits, targets, coefficients, torch.arange(targets.numel(), device=targets.device)[None])
        fields = self._fields()
        statistics = None
        if fields:
            statistics = token_statistics(logits, targets, ignore_index=self.settings.ignore_index, fields=fields)
        scores = self._score(statistics, countable, reference_nll)
        selection = self._select(scores, countable, draw)
        coefficients = loss_coefficients(selection, countable, token_weight=token_weight, num_items=num_items)
        loss = self._loss(logits, targets, coefficients, selection.index)
        return self._finish(loss, countable, selection, scores, statistics, bad)

    def _loss(self, logits: Tensor, targets: Tensor, coefficients: Tensor, index: Tensor) -> Tensor:
        index, coefficients = index[0], coefficients[0]
        S, V = logits.shape[1:]
        if has_flat_rows(logits):
            rows = logits.view(-1, V).index_select(0, index)
        else:
            rows = logits[index // max(1, S), index % max(1, S)]
        # Rows without weight are ignored, not multiplied by 0: their loss may be infinite.
        kept = targets.reshape(-1)[index].masked_fill(coefficients == 0.0, self.settings.ignore_index)
        # Whatever an ignored row holds: the softmax of NaN times a gradient of 0 is NaN. (In place: these are copies.)
        rows = rows.masked_fill_((kept == self.settings.ignore_index)[:, None], 0.0)
        rows = rows.to(accumulation_dtype(rows.dtype))
        nll = nn.functional.cross_entropy(rows, kept, ignore_index=self.settings.ignore_index, reduction="none")
        return (nll * coefficients).sum()


class CGGRLinearLoss(TokenLoss):
    """Cross-entropy on the kept tokens, from hidden states and the head's weight, without a logits tensor.

    Scores come from the logits of a chunk of rows at a time, and the head's forward and backward run on the kept rows
    only: three matrix products on those, after one on all rows (none with ``selection="random"``). Otherwise it equals
    :class:`CGGRLoss` of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    The constructor has the arguments and errors of :class:`CGGRLoss`.

    Example:
        >>> criterion = CGGRLinearLoss(min_tokens_ratio=0.25)
        >>> hidden, weight = torch.randn(2, 8, 4, requires_grad=True), torch.randn(16, 4)
        >>> criterion(hidden, weight, torch.randint(0, 16, (2, 8))).backward()
        >>> int(hidden.grad.abs().sum(2).count_nonzero())
        4
    """

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        bias: Tensor | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        token_weight: Tensor | None = None,
        reference_nll: Tensor | None = None,
        num_items: Tensor | float | None = None,
        draw: int | Tensor | None = None,
    ) -> Tensor:
        """The loss of the kept tokens.

        Args:
            hidden: Final hidden states, [B, S, H] or [N, H].
            weight: The head's weight, [V, H].
            targets: Class indices, [B, S] or [N], aligned: the target at t is what the hidden state at t predicts.
            bias: The head's bias, [V].
            softcap: Bound on the logits; None for none.
            scale: Factor on the logits before the softcap; None for 1.
            token_weight: Factor on each token's loss, shape of ``targets``; a constant.
            reference_nll: A reference model's nll of each token in nats, shape of ``targets``, for "excess".
            num_items: What the sum is divided by; None for the countable tokens of this batch.
            draw: As in :meth:`CGGRLoss.forward`.

        Returns:
            0-dim float32.

        Raises:
            TypeError: If a dtype is wrong.
            ValueError: If a shape, device or (on CPU) a value is wrong.
        """
        check_head(hidden, weight, bias, softcap, scale)
        if hidden.dim() not in (2, 3):
            raise ValueError(f"hidden must be [B, S, H] or [N, H], got shape {tuple(hidden.shape)}")
        V = weight.shape[0]
        targets = check_targets("targets", targets, hidden.shape[:-1], V, self.settings.ignore_index, hidden, "hidden")
        check_per_token(targets, token_weight=token_weight, reference_nll=reference_nll)
        self._begin()
        if hidden.dim() == 2:
            hidden, targets = hidden[None], targets[None]
            token_weight, reference_nll = with_row(token_weight), with_row(reference_nll)
        targets, bad = self._targets(targets, V)
        countable = targets != self.settings.ignore_index
        head: dict[str, Any] = {
            "bias": bias,
            "softcap": softcap,
            "scale": scale,
            "ignore_index": self.settings.ignore_index,
        }
        rows, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        if not self.training:
            coefficients = all_coefficients(countable, token_weight, num_items)
            return linear_cross_entropy(rows, weight, flat_targets, row_weight=coefficients[0], **head)
        fields = self._fields()
        statistics = None
        if fields:
            statistics = linear_token_statistics(hidden, weight, targets, fields=fields, **head)
        scores = self._score(statistics, countable, reference_nll)
        selection = self._select(scores, countable, draw)
        coefficients = loss_coefficients(selection, countable, token_weight=token_weight, num_items=num_items)
        loss = linear_cross_entropy(
            rows, weight, flat_targets, row_index=selection.index[0], row_weight=coefficients[0], **head
        )
        return self._finish(loss, countable, selection, scores, statistics, bad)
