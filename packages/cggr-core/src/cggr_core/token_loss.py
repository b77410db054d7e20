"""The base of the two losses: settings, the order of a step, metrics and state."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cggr_core.checks import (
    bad_targets_message,
    check_float,
    check_same_device,
    check_shape,
    count_bad_targets,
    values_are_free,
)
from cggr_core.monitor import Monitor
from cggr_core.schedule import Schedule
from cggr_core.scoring import fields_for, score
from cggr_core.selection import Selection
from cggr_core.settings import SelectionSettings
from cggr_core.statistics import TokenStatistics
from cggr_core.strategies import select

__all__ = ["TokenLoss", "check_per_token", "with_row"]


class TokenLoss(nn.Module):
    """Base of both losses: settings, the order of a step, metrics and state."""

    def __init__(
        self,
        *,
        scoring: str = SelectionSettings.scoring,
        selection: str = SelectionSettings.selection,
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
    ) -> None:
        super().__init__()
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
        self._monitor = Monitor()
        self._bad_targets = 0
        self._bad_logits = 0
        self._vocab_size = 0
        self._last: tuple[Tensor, Tensor, Selection, Tensor | None, TokenStatistics | None] | None = None

    def extra_repr(self) -> str:
        """The settings, for ``repr``."""
        return f"scoring={self.settings.scoring!r}, selection={self.settings.selection!r}, schedule={self.schedule!r}"

    def step(self) -> None:
        """Advance the schedule; call it after each optimizer step."""
        self.schedule.step()

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Metrics of the last training forward, as 0-dim tensors on its device; empty before the first.

        ``loss``, ``keep_ratio``, ``kept_tokens``, ``countable_tokens``; if tokens were scored, ``score_kept`` and
        ``score_dropped`` (means), ``full_loss`` (mean nll of all countable tokens, nats) and ``confidence`` (their mean
        top-1 probability).
        """
        if self._last is None:
            return {}
        loss, countable, selection, scores, statistics = self._last
        n = countable.sum()
        found = {
            "loss": loss,
            "keep_ratio": selection.ratio,
            "kept_tokens": selection.valid.sum(),
            "countable_tokens": n,
        }
        if scores is not None:
            kept = selection.mask
            found["score_kept"] = _mean(scores, kept)
            found["score_dropped"] = _mean(scores, countable & ~kept)
        if statistics is not None and statistics.nll is not None:
            found["full_loss"] = _mean(statistics.nll, countable)
        if statistics is not None and statistics.confidence is not None:
            found["confidence"] = _mean(statistics.confidence, countable)
        return found

    def get_extra_state(self) -> Tensor:
        """Steps, draws and confidence of the schedule as a float64 tensor, so that any checkpoint format holds it."""
        self._read_reports(wait=True)
        state = self.schedule.state_dict()
        confidence = math.nan if state["confidence"] is None else state["confidence"]
        return torch.tensor([state["steps"], state["draws"], confidence], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore :meth:`get_extra_state`; the next selections are those of the run that saved it."""
        steps, draws, confidence = state.tolist()
        self.schedule.load_state_dict(
            {
                "steps": int(steps),
                "draws": int(draws),
                "confidence": None if math.isnan(confidence) else confidence,
            }
        )

    def _read_reports(self, *, wait: bool) -> None:
        """Read what the device has reported: counts of bad values, and the confidence of the previous batch."""
        found = self._monitor.read(wait=wait)
        if found is not None:
            self._bad_targets += int(found[0])
            self._bad_logits += int(found[1])
            self.schedule.observe(found[2])

    def _begin(self) -> None:
        """Raise what an earlier step reported, before this step does anything."""
        if torch.compiler.is_compiling():
            return
        # Waiting makes the ratio, and so the selection, a function of the data and not of timing.
        self._read_reports(wait=self.schedule.reads_confidence)
        targets, logits = self._bad_targets, self._bad_logits
        self._bad_targets = self._bad_logits = 0
        if targets:
            message = bad_targets_message("targets", targets, self._vocab_size, self.settings.ignore_index)
            raise ValueError(f"in an earlier step, {message}")
        if logits:
            raise ValueError(f"in an earlier step, logits were NaN at {logits} countable position(s)")

    @property
    def _scores(self) -> bool:
        """Whether the selection depends on scores: not if it is random, or if everything is kept."""
        return self.settings.reads_scores and self.schedule.ratio < 1.0

    def _fields(self) -> frozenset[str]:
        """The statistics to compute; nll and confidence come almost free once any is computed."""
        if not self._scores:
            return frozenset({"confidence"}) if self.schedule.reads_confidence else frozenset()
        return fields_for(self.settings.scoring) | {"nll", "confidence"}

    def _targets(self, targets: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Targets with ignore_index in place of what is outside the vocabulary, and the count of those."""
        bad = count_bad_targets(targets, vocab_size, self.settings.ignore_index)
        inside = (targets >= 0) & (targets < vocab_size)
        self._vocab_size = vocab_size
        return targets.masked_fill(~inside, self.settings.ignore_index), bad

    def _score(
        self, statistics: TokenStatistics | None, countable: Tensor, reference_nll: Tensor | None
    ) -> Tensor | None:
        if reference_nll is not None and self.settings.scoring != "excess":
            raise ValueError(f"reference_nll is used only by scoring='excess', got scoring={self.settings.scoring!r}")
        if not self._scores:
            return None
        assert statistics is not None  # every other selection asks for fields
        scores = score(statistics, scoring=self.settings.scoring, reference_nll=reference_nll)
        return scores.masked_fill(~countable, 0.0)

    def _select(self, scores: Tensor | None, countable: Tensor, draw: int | Tensor | None) -> Selection:
        if scores is None:
            scores = torch.zeros(countable.shape, device=countable.device)
        if draw is None:
            compiling = torch.compiler.is_compiling()
            draw = self.schedule.next_draw_tensor() if compiling else self.schedule.next_draw()
        return select(
            scores,
            countable,
            ratio=self.schedule.ratio,
            selection=self.settings.selection,
            scope="batch",
            capacity=self._capacity(countable),
            num_strata=self.settings.num_strata,
            min_tokens_per_sequence=self.settings.min_tokens_per_sequence,
            block_size=self.settings.block_size,
            unbiased=self.settings.unbiased,
            seed=self.settings.seed,
            draw=draw,
        )

    def _capacity(self, countable: Tensor) -> int | None:
        if not countable.numel():
            return None
        capacity = self.schedule.capacity(countable.numel())
        if self.settings.selection == "sequence_aware":
            capacity = max(capacity, min(countable.numel(), countable.shape[0] * self.settings.min_tokens_per_sequence))
        return capacity

    def _finish(
        self,
        loss: Tensor,
        countable: Tensor,
        selection: Selection,
        scores: Tensor | None,
        statistics: TokenStatistics | None,
        bad_targets: Tensor,
    ) -> Tensor:
        self._last = (loss.detach(), countable, selection, scores, statistics)
        if values_are_free(loss):
            if bool(loss.isnan()):
                raise ValueError("the loss is NaN: logits are NaN, or infinite, at a kept position")
            if self.schedule.reads_confidence and statistics is not None:
                self._monitor.post(torch.stack([loss.new_zeros(()), loss.new_zeros(()), self._confidence(statistics)]))
        elif not torch.compiler.is_compiling():
            bad_logits = loss.detach().isnan()
            if statistics is not None:
                present = next(column for column in statistics[:-1] if column is not None)
                bad_logits = (present.isnan() & countable).sum()
            confidence = loss.new_full((), math.nan) if statistics is None else self._confidence(statistics)
            self._monitor.post(torch.stack([bad_targets.float(), bad_logits.float(), confidence.float()]))
        self.schedule.note_forward()
        return loss

    def _confidence(self, statistics: TokenStatistics) -> Tensor:
        """Mean top-1 probability of the countable tokens (the others hold 0); NaN where there is none."""
        assert statistics.confidence is not None
        return statistics.confidence.sum() / (statistics.confidence > 0).sum()


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def check_per_token(targets: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless each of ``tensors`` that is not None has the shape and device of ``targets``."""
    for name, tensor in tensors.items():
        if tensor is not None:
            check_float(name, tensor)
            check_shape(name, tensor, targets.shape, "that of targets")
            check_same_device(name, tensor, "targets", targets)


def with_row(tensor: Tensor | None) -> Tensor | None:
    """[N] as [1, N]."""
    return None if tensor is None else tensor[None]
