"""One training forward of CGGRModel: what every gradient mode does with the same batch.

Data flow one way: statistics, scores, selection, gradient pass (or plain forward), weighted loss, metrics.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_core.loss import loss_coefficients
from cggr_core.readout import HeadReadout
from cggr_core.router import router_statistics
from cggr_core.scoring import TokenStatistics, fields_for, score
from cggr_core.selection import Selection, select
from cggr_core.targets import Targets

if TYPE_CHECKING:
    from cggr_core.model import CGGRModel
    from cggr_core.routing import Engine, TokenInputs

# Selections that look at no score.
SCORELESS = ("random", "supervised")


class TrainingStep:
    """A batch, and a method for each gradient mode that turns it into a loss."""

    def __init__(
        self,
        config: "CGGRModel",
        batch: "TokenInputs",
        arguments: dict[str, Any],
        targets: Targets,
        token_weight: Tensor | None,
        reference_nll: Tensor | None,
        num_items: Tensor | float | None,
        selection: Selection | None,
        draw: int | Tensor | None,
        first_row: int,
    ) -> None:
        self.config = config
        self.passes: Engine = config._passes
        self.batch = batch
        self.arguments = arguments
        self.targets = targets
        self.token_weight = token_weight
        self.reference_nll = reference_nll
        self.num_items = num_items
        self.selection = selection
        self.draw = draw
        self.first_row = first_row
        self.statistics: TokenStatistics | None = None
        self.score: Tensor | None = None
        self.engine = "plain"
        self.at_full_depth = False
        self.auxiliary_loss: Tensor | None = None
        self.readout = HeadReadout(self.passes.architecture.head, ignore_index=config.ignore_index)
        self.needs_scores = selection is None and config.selection not in SCORELESS

    def exact(self) -> Tensor:
        """Ordinary forward; the loss and the head's backward are those of the kept tokens."""
        values, self.auxiliary_loss = self.passes.plain(self.arguments)
        if self.needs_scores:
            if self.config.router is None:
                self._score_from(values.detach(), full_depth=True)
            else:
                self._score_by_router()
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
        config = self.config
        if self.needs_scores:
            if config.router is None:
                with torch.no_grad():
                    values, _ = self.passes.plain(self.arguments)
                self._score_from(values, full_depth=True)
            else:
                self._score_by_router()
        countable = self.targets.countable
        counts = countable.sum(1)
        row_score = counts.float() if self.score is None else (self.score * countable).sum(1) / counts.clamp(min=1)
        rows = self._selected(row_score[None], (counts > 0)[None], capacity=None, block_size=1)
        index, weight = rows.index[0], rows.weight[0]
        length = self.batch.shape[1]
        kept = {
            name: value.index_select(0, index) if _is_batched(value, self.batch.shape[0]) else value
            for name, value in self.arguments.items()
        }
        values, self.auxiliary_loss = self.passes.plain(kept)
        tokens = self.targets.tokens.index_select(0, index)
        coefficients = weight[:, None] * (tokens != config.ignore_index) / self._denominator()
        if self.token_weight is not None:
            coefficients = coefficients * self.token_weight.index_select(0, index)
        mask = torch.zeros_like(countable).index_put_((index,), rows.valid[0][:, None].expand(-1, length)) & countable
        self.mask = mask
        return self._with_auxiliary(self.readout.weighted_loss(values, tokens, coefficients))

    def _routed(self, *, keep_graph: bool) -> Tensor:
        from cggr_core.routing import NO_CONTEXT

        config, passes = self.config, self.passes
        if config.schedule.ratio == 1.0 and self.selection is None and config.selection != "supervised":
            return self.exact()
        context, depth = NO_CONTEXT, passes.depth
        engine = config.engine or ("two_pass" if self.needs_scores and config.router is None else "interleaved")
        if self.needs_scores:
            scored = depth if config.router is None else config._own_depth if engine == "interleaved" else None
            if scored is not None:
                context, values = passes.context(self.batch, depth=scored, keep_graph=keep_graph, head=True)
                assert values is not None  # asked for by head=True
                self._score_from(values, full_depth=config.router is None)
            else:
                self._score_by_router()
        if engine == "two_pass" and context is NO_CONTEXT:
            context, _ = passes.context(self.batch, depth=depth, keep_graph=keep_graph, head=False)
        selection = self._select()
        self.engine = engine
        values, self.auxiliary_loss = passes.gradient(self.batch, selection, context, keep_graph=keep_graph)
        return self._loss(values, selection)

    def _fields(self, *, full_depth: bool) -> frozenset[str]:
        fields = fields_for(self.config.scoring, True)
        if self.config.schedule.dynamic_threshold:
            fields |= {"confidence"}
        return fields | {"nll"} if full_depth else fields

    def _score_from(self, values: Tensor, *, full_depth: bool) -> None:
        with self._timed():
            fields = self._fields(full_depth=full_depth)
            statistics = self.readout.statistics(values, self.targets.tokens, fields=fields)
        self.at_full_depth = full_depth
        self._take(statistics)

    def _score_by_router(self) -> None:
        with self._timed():
            statistics = router_statistics(
                self.config.router,
                self.arguments,
                self.targets.tokens,
                fields=self._fields(full_depth=False),
                ignore_index=self.config.ignore_index,
            )
        self._take(statistics)

    def _timed(self) -> AbstractContextManager[None]:
        stopwatch = self.config.scoring_stopwatch
        return nullcontext() if stopwatch is None else stopwatch.measure(self.targets.countable.device)

    def _take(self, statistics: TokenStatistics) -> None:
        self.statistics = statistics
        self.score = score(statistics, scoring=self.config.scoring, reference_nll=self.reference_nll)

    def _select(self) -> Selection:
        if self.selection is None:
            self.selection = self._made()
        return self.selection

    def _made(self) -> Selection:
        countable = self.targets.countable
        if self.config.selection == "supervised":
            return Selection.from_mask(countable, countable=countable)
        score = torch.zeros(countable.shape, device=countable.device) if self.score is None else self.score
        capacity = self.config.schedule.capacity(self.batch.shape[1])
        if self.config.selection == "sequence_aware":
            capacity = min(max(capacity, self.config.min_tokens_per_sequence), self.batch.shape[1])
        return self._selected(score, countable, capacity=capacity, block_size=self.config.block_size)

    def _selected(self, score: Tensor, countable: Tensor, *, capacity: int | None, block_size: int) -> Selection:
        config = self.config
        return select(
            score,
            countable,
            ratio=config.schedule.ratio,
            selection=config.selection,
            scope="row",
            capacity=capacity,
            num_strata=config.num_strata,
            min_tokens_per_sequence=config.min_tokens_per_sequence,
            block_size=block_size,
            unbiased=config.unbiased,
            seed=config.seed,
            draw=config._next_draw(countable.device) if self.draw is None else self.draw,
            first_row=self.first_row,
        )

    def _loss(self, values: Tensor, selection: Selection) -> Tensor:
        self.mask = selection.mask
        coefficients = loss_coefficients(
            selection, self.targets.countable, token_weight=self.token_weight, num_items=self.num_items
        )
        targets = self.targets.tokens.gather(1, selection.index)
        return self._with_auxiliary(self.readout.weighted_loss(values, targets, coefficients))

    def _with_auxiliary(self, loss: Tensor) -> Tensor:
        return loss if self.auxiliary_loss is None else loss + self.auxiliary_loss

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
            "gradient": self.config.gradient,
            "engine": self.engine,
        }
        if self.auxiliary_loss is not None:
            metrics["auxiliary_loss"] = self.auxiliary_loss.detach()
        if self.score is not None and self.statistics is not None:
            dropped = countable & ~kept
            metrics["score_kept"] = (self.score * kept).sum() / kept_count.clamp(min=1)
            metrics["score_dropped"] = (self.score * dropped).sum() / dropped.sum().clamp(min=1)
            if self.statistics.gradnorm is not None:
                squares = self.statistics.gradnorm.square()
                metrics["gradnorm_kept"] = (squares * kept).sum() / (squares * countable).sum().clamp(min=1e-30)
            if self.statistics.confidence is not None:
                metrics["confidence"] = (self.statistics.confidence * countable).sum() / count.clamp(min=1)
            if self.at_full_depth and self.statistics.nll is not None:
                metrics["full_loss"] = (self.statistics.nll * countable).sum() / count.clamp(min=1)
        return metrics


def _is_batched(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
