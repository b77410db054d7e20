"""One training forward of CGGRModel: what every gradient mode does with the same batch.

Data flow one way: statistics, scores, selection, gradient pass (or plain forward), weighted loss, metrics.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_core.loss import loss_coefficients
from cggr_core.observation import Observation
from cggr_core.readout import HeadReadout
from cggr_core.score_source import ScoreSource
from cggr_core.selection import Selection, select
from cggr_core.targets import Targets

if TYPE_CHECKING:
    from cggr_core.model import CGGRModel
    from cggr_core.routing import Engine, TokenInputs


class TrainingStep:
    """A batch, and a method for each gradient mode that turns it into a loss."""

    def __init__(
        self,
        config: "CGGRModel",
        batch: "TokenInputs",
        arguments: dict[str, Any],
        targets: Targets,
        *,
        token_weight: Tensor | None,
        reference_nll: Tensor | None,
        num_items: Tensor | float | None,
        selection: Selection | None,
        draw: int | Tensor | None,
        first_row: int,
        example_ids: Tensor | None,
    ) -> None:
        self.config = config
        self.passes: Engine = config._passes
        self.batch = batch
        self.arguments = arguments
        self.targets = targets
        self.token_weight = token_weight
        self.num_items = num_items
        self.selection = selection
        self.draw = draw
        self.first_row = first_row
        self.engine = "plain"
        self.auxiliary_loss: Tensor | None = None
        self.inclusion_weight: Tensor | None = None
        self.readout = HeadReadout(self.passes.architecture.head, ignore_index=config.settings.ignore_index)
        self.scores = ScoreSource(
            config,
            targets,
            self.readout,
            reference_nll=reference_nll,
            example_ids=example_ids,
            asked=selection is None and config.settings.reads_scores,
        )
        self.keeps_all = (
            selection is None and config.settings.selection != "supervised" and config.schedule.ratio == 1.0
        )

    def exact(self) -> Tensor:
        """Ordinary forward; the loss and the head's backward are those of the kept tokens."""
        with self.scores.tapped():
            values, self.auxiliary_loss = self.passes.plain(self.arguments)
        self.scores.read(self.arguments, values if self.config.router is None else None)
        selection = self._select()
        kept = values.gather(1, selection.index[:, :, None].expand(-1, -1, values.shape[2]))
        return self._loss(kept, selection)

    def kv(self) -> Tensor:
        """Gradients of kept tokens, and of all tokens' key and value projections."""
        return self._routed(keep_graph=True)

    def detached(self) -> Tensor:
        """Gradients of kept tokens; other tokens' keys and values are constants."""
        return self._routed(keep_graph=False)

    def sequence(self) -> Tensor:
        """Ordinary forward and backward of the kept rows."""
        if self.keeps_all:
            return self.exact()
        self.scores.read(self.arguments, self.scores.scoring_pass(self.arguments))
        countable, score = self.targets.countable, self.scores.score
        counts = countable.sum(1)
        row_score = counts.float() if score is None else (score * countable).sum(1) / counts.clamp(min=1)
        rows = self._selected(row_score[None], (counts > 0)[None], capacity=None, block_size=1)
        index, length = rows.index[0], self.batch.shape[1]
        kept = {
            name: value.index_select(0, index) if _is_batched(value, self.batch.shape[0]) else value
            for name, value in self.arguments.items()
        }
        values, self.auxiliary_loss = self.passes.plain(kept)
        targets = self.targets.tokens.index_select(0, index)
        counted = targets != self.config.settings.ignore_index
        coefficients = rows.weight[0][:, None] * counted / self._denominator()
        if self.token_weight is not None:
            coefficients = coefficients * self.token_weight.index_select(0, index)
        mask = torch.zeros_like(countable).index_put_((index,), rows.valid[0][:, None].expand(-1, length)) & countable
        self.mask = mask
        position = torch.arange(length, device=index.device).expand_as(targets)
        weight = self._inclusion_weight(rows)[0][:, None] * counted
        self.scores.observe(Observation(values, targets, weight, index, position))
        return self._with_auxiliary(self.readout.weighted_loss(values, targets, coefficients))

    def _routed(self, *, keep_graph: bool) -> Tensor:
        from cggr_core.routing import NO_CONTEXT

        if self.keeps_all:
            return self.exact()
        config, passes, scores = self.config, self.passes, self.scores
        context, values = NO_CONTEXT, None
        engine = config.settings.engine or ("two_pass" if scores.needed and config.router is None else "interleaved")
        depth = scores.context_depth(engine)
        if depth is not None:
            head = scores.learner is None
            with scores.tapped():
                context, values = passes.context(self.batch, depth=depth, keep_graph=keep_graph, head=head)
        elif engine == "two_pass":
            context, _ = passes.context(self.batch, depth=passes.depth, keep_graph=keep_graph, head=False)
        scores.read(self.arguments, values)
        selection = self._select()
        self.engine = engine
        values, self.auxiliary_loss = passes.gradient(self.batch, selection, context, keep_graph=keep_graph)
        return self._loss(values, selection)

    def _select(self) -> Selection:
        if self.selection is None:
            self.selection = self._made()
        return self.selection

    def _made(self) -> Selection:
        countable, score = self.targets.countable, self.scores.score
        if self.config.settings.selection == "supervised":
            return Selection.from_mask(countable, countable=countable)
        if score is None:
            score = torch.zeros(countable.shape, device=countable.device)
        capacity = self.config.schedule.capacity(self.batch.shape[1])
        if self.config.settings.selection == "sequence_aware":
            capacity = min(max(capacity, self.config.settings.min_tokens_per_sequence), self.batch.shape[1])
        return self._selected(score, countable, capacity=capacity, block_size=self.config.settings.block_size)

    def _selected(self, score: Tensor, countable: Tensor, *, capacity: int | None, block_size: int) -> Selection:
        config = self.config
        # A router learns what all tokens' scores are, also where the loss is that of the kept ones alone.
        unbiased = config.settings.unbiased or self.scores.learner is not None
        selection = select(
            score,
            countable,
            ratio=config.schedule.ratio,
            selection=config.settings.selection,
            scope="row",
            capacity=capacity,
            num_strata=config.settings.num_strata,
            min_tokens_per_sequence=config.settings.min_tokens_per_sequence,
            block_size=block_size,
            unbiased=unbiased,
            seed=config.settings.seed,
            draw=config._next_draw(countable.device) if self.draw is None else self.draw,
            first_row=self.first_row,
        )
        if unbiased == config.settings.unbiased:
            return selection
        self.inclusion_weight = selection.weight
        plain = countable.sum(1, keepdim=True) / selection.valid.sum(1, keepdim=True).clamp(min=1) * selection.valid
        return dataclasses.replace(selection, weight=plain.float())

    def _inclusion_weight(self, selection: Selection) -> Tensor:
        return selection.weight if self.inclusion_weight is None else self.inclusion_weight

    def _loss(self, values: Tensor, selection: Selection) -> Tensor:
        self.mask = selection.mask
        coefficients = loss_coefficients(
            selection, self.targets.countable, token_weight=self.token_weight, num_items=self.num_items
        )
        targets = self.targets.tokens.gather(1, selection.index)
        rows = torch.arange(targets.shape[0], device=targets.device)
        weight = self._inclusion_weight(selection)
        self.scores.observe(Observation(values, targets, weight, rows, selection.index))
        return self._with_auxiliary(self.readout.weighted_loss(values, targets, coefficients))

    def _with_auxiliary(self, loss: Tensor) -> Tensor:
        if self.auxiliary_loss is None:
            return loss
        if self.num_items is not None:
            # A mean over this batch's tokens: it counts with the batch's share of the tokens that the loss is about.
            self.auxiliary_loss = self.auxiliary_loss * (self.targets.countable.sum() / self.num_items)
        return loss + self.auxiliary_loss

    def _denominator(self) -> Tensor | float:
        return self.targets.countable.sum().clamp(min=1) if self.num_items is None else self.num_items

    def metrics(self, loss: Tensor) -> dict[str, Any]:
        """See :attr:`CGGRModel.metrics`."""
        countable, kept = self.targets.countable, self.mask & self.targets.countable
        count, kept_count = countable.sum(), kept.sum()
        metrics: dict[str, Any] = {
            "loss": loss.detach(),
            "keep_ratio": kept_count / count.clamp(min=1),
            "kept_tokens": kept_count,
            "countable_tokens": count,
            "gradient": self.config.settings.gradient,
            "engine": self.engine,
        }
        if self.auxiliary_loss is not None:
            metrics["auxiliary_loss"] = self.auxiliary_loss.detach()
        return metrics | self.scores.metrics(kept)


def _is_batched(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
