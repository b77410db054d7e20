"""CGGRScorer: score and mask of every token, for architectures that do their own routing."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.checks import (
    bad_targets_message,
    check_choice,
    check_integers,
    check_same_device,
    check_shape,
    count_bad_targets,
    values_are_free,
)
from cggr_core.monitor import Monitor
from cggr_core.routers import TruncatedRouter, router_statistics
from cggr_core.schedule import Schedule
from cggr_core.scoring import fields_for, score
from cggr_core.selection import Selection
from cggr_core.settings import SCOPES, SelectionSettings
from cggr_core.statistics import TokenStatistics
from cggr_core.step import Router
from cggr_core.strategies import select
from cggr_core.targets import at_predictors

__all__ = ["CGGRScorer"]


class CGGRScorer(nn.Module):
    """Score every token with a router and mark the ones to keep.

    Shapes are static and the host reads nothing. The score at position t is about predicting the token at t + 1, so
    with labels the last position is not countable (with a masked language model's router, position t is about t).

    Args:
        router: :func:`~cggr_core.create_truncated_router`, or a callable ``router(input_ids, ...)`` that returns
            logits [B, S, V] or an object with ``.logits``.
        scoring: See :func:`~cggr_core.score`; without labels it must be "combined", "entropy" or "margin".
        selection: See :func:`~cggr_core.select`.
        scope: "row" keeps the ratio in each row, "batch" over the batch.
        min_tokens_ratio: Keep ratio in (0, 1], after the warmup.
        warmup_steps: Steps over which the ratio falls from 1 to ``min_tokens_ratio``; call :meth:`step`.
        dynamic_threshold: Adapt the ratio to the confidence of the previous batch, see :class:`~cggr_core.Schedule`.
        threshold_sensitivity: How strongly the confidence changes the ratio.
        num_strata: Score buckets of "stratified".
        min_tokens_per_sequence: Minimum number of kept tokens per row for "sequence_aware".
        block_size: Choose blocks of this many neighbouring tokens.
        unbiased: Weight kept tokens by 1 / inclusion probability.
        seed: Seed of the random choices.
        ignore_index: Label that is never scored, kept or counted.
        shifted: Whether the label of position t is at t + 1. None derives it from a truncated router's architecture,
            and assumes that other routers are causal.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If a name or a number is not accepted.

    Example:
        >>> table = torch.nn.Embedding(16, 16)
        >>> scorer = CGGRScorer(table, scoring="entropy", min_tokens_ratio=0.5)
        >>> scores, mask, info = scorer(torch.randint(0, 16, (2, 8)))
        >>> mask.sum(1)
        tensor([4, 4])
    """

    def __init__(
        self,
        router: Any,
        *,
        scoring: str = SelectionSettings.scoring,
        selection: str = SelectionSettings.selection,
        scope: str = "row",
        num_strata: int = SelectionSettings.num_strata,
        min_tokens_per_sequence: int = SelectionSettings.min_tokens_per_sequence,
        dynamic_threshold: bool = SelectionSettings.dynamic_threshold,
        threshold_sensitivity: float = SelectionSettings.threshold_sensitivity,
        min_tokens_ratio: float = SelectionSettings.min_tokens_ratio,
        warmup_steps: int = SelectionSettings.warmup_steps,
        block_size: int = SelectionSettings.block_size,
        unbiased: bool = SelectionSettings.unbiased,
        seed: int = SelectionSettings.seed,
        ignore_index: int = SelectionSettings.ignore_index,
        shifted: bool | None = None,
    ) -> None:
        super().__init__()
        if isinstance(router, Router):
            raise TypeError(
                f"a {type(router).__name__} works only in CGGRModel, which passes it hidden states; use "
                "create_truncated_router"
            )
        if not callable(router):
            raise TypeError(f"router must be callable, got {type(router).__name__}")
        self.router = router
        self.scope = check_choice("scope", scope, SCOPES)
        self.settings = SelectionSettings(
            scoring=scoring,
            selection=selection,
            num_strata=num_strata,
            min_tokens_per_sequence=min_tokens_per_sequence,
            block_size=block_size,
            unbiased=unbiased,
            min_tokens_ratio=min_tokens_ratio,
            warmup_steps=warmup_steps,
            dynamic_threshold=dynamic_threshold,
            threshold_sensitivity=threshold_sensitivity,
            seed=seed,
            ignore_index=ignore_index,
        )
        self.schedule = Schedule.of(self.settings)
        self._shifted = shifted
        self._vocab_size = 0
        self._monitor = Monitor()

    def step(self) -> None:
        """Advance the schedule; call it after each optimizer step."""
        self.schedule.step()

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        reference_nll: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Score every token and choose the tokens to keep.

        Args:
            input_ids: int64 [B, S].
            labels: int64 [B, S] in Hugging Face's convention (not shifted). None makes every token of the attention
                mask countable.
            attention_mask: [B, S], 0 for padding; passed to the router.
            position_ids: [B, S]; passed to the router.
            reference_nll: [B, S], a reference model's nll at each position in nats, for "excess".

        Returns:
            ``scores`` float32 [B, S], higher is more worth learning from, 0 where not countable; ``mask`` bool [B, S];
            and ``info`` with the ``selection`` (:class:`~cggr_core.Selection`, which holds the weights), the
            ``statistics`` (:class:`~cggr_core.TokenStatistics`), ``countable`` [B, S] bool, and the 0-dim
            ``keep_ratio``.

        Raises:
            TypeError: If the router returns no logits.
            ValueError: If a shape or device does not match, or a label is outside the vocabulary (on devices other than
                the CPU, a later call raises).
        """
        if check_integers("input_ids", input_ids).dim() != 2:
            raise ValueError(f"input_ids must be [B, S], got shape {tuple(input_ids.shape)}")
        shape = input_ids.shape
        per_token = {"labels": labels, "attention_mask": attention_mask, "position_ids": position_ids}
        for name, tensor in per_token.items():
            if tensor is not None:
                check_shape(name, tensor, shape, "that of input_ids")
                check_same_device(name, tensor, "input_ids", input_ids)
        fields = fields_for(self.settings.scoring, labels is not None) | {"confidence"}
        self._begin()
        targets = None if labels is None else self._aligned(labels)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        router = self.router
        if not isinstance(router, TruncatedRouter):
            # Its first argument may have any name.
            router = partial(router, given.pop("input_ids"))
        statistics = router_statistics(
            router, given, targets, shape=shape, fields=fields, ignore_index=self.settings.ignore_index
        )
        if targets is None:
            countable = torch.ones_like(input_ids, dtype=torch.bool)
            countable = countable if attention_mask is None else attention_mask.bool()
        else:
            countable = (targets >= 0) & (targets < statistics.vocab_size) & (targets != self.settings.ignore_index)
        scores = score(statistics, scoring=self.settings.scoring, reference_nll=reference_nll)
        scores = scores.masked_fill(~countable, 0.0)
        selection = self._select(scores, countable)
        if self.training:
            self.schedule.note_forward()
        self._post(statistics, targets, countable)
        info = {
            "selection": selection,
            "statistics": statistics,
            "countable": countable,
            "keep_ratio": selection.ratio,
        }
        return scores, selection.mask, info

    def _select(self, scores: Tensor, countable: Tensor) -> Selection:
        batch, length = scores.shape
        if self.scope == "batch":
            length *= batch
        capacity = None
        if scores.numel() and self.settings.selection != "sequence_aware":
            capacity = self.schedule.capacity(length)
        return select(
            scores,
            countable,
            ratio=self.schedule.ratio,
            selection=self.settings.selection,
            scope=self.scope,
            capacity=capacity,
            num_strata=self.settings.num_strata,
            min_tokens_per_sequence=self.settings.min_tokens_per_sequence,
            block_size=self.settings.block_size,
            unbiased=self.settings.unbiased,
            seed=self.settings.seed,
            draw=self.schedule.next_draw(),
        )

    def _post(self, statistics: TokenStatistics, targets: Tensor | None, countable: Tensor) -> None:
        """Pass errors, and the confidence that changes the ratio, on to a later call."""
        assert statistics.confidence is not None  # asked for
        confidence = statistics.confidence.masked_fill(~countable, 0.0).sum() / countable.sum()
        bad = countable.new_zeros((), dtype=torch.int64)
        if targets is not None:
            bad = count_bad_targets(targets, statistics.vocab_size, self.settings.ignore_index)
        nan = (statistics.confidence.isnan() & countable).sum()
        if self.schedule.reads_confidence or not values_are_free(countable):
            self._monitor.post(torch.stack([bad.float(), nan.float(), confidence.float()]))
        self._vocab_size = statistics.vocab_size

    def _begin(self) -> None:
        found = self._monitor.read(wait=self.schedule.reads_confidence)
        if found is None:
            return
        bad, nan, confidence = found
        if bad:
            message = bad_targets_message("labels", int(bad), self._vocab_size, self.settings.ignore_index)
            raise ValueError(f"in an earlier call, {message}")
        if nan:
            raise ValueError(f"in an earlier call, the router's logits were NaN at {int(nan)} countable position(s)")
        self.schedule.observe(confidence)

    def _aligned(self, labels: Tensor) -> Tensor:
        check_integers("labels", labels)
        shifted = self._shifted
        if shifted is None:
            shifted = not isinstance(self.router, TruncatedRouter) or self.router.engine.architecture.shifted
        return at_predictors(labels, self.settings.ignore_index) if shifted else labels
