"""Where the scores of a training forward come from, and what is shown back to routers that learn or remember them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cggr_core.collectives import largest_over_ranks, world_size
from cggr_core.learned_router import LearnedRouter
from cggr_core.monitor import Monitor
from cggr_core.observation import Observation
from cggr_core.readout import HeadReadout
from cggr_core.remembered import RememberedScores
from cggr_core.router import router_statistics
from cggr_core.scoring import TokenStatistics, fields_for, score
from cggr_core.targets import Targets

if TYPE_CHECKING:
    from cggr_core.model import CGGRModel
    from cggr_core.routing import Engine


class ScoreSource:
    """The scores of one batch.

    Args:
        config: The model.
        targets: Of the batch.
        readout: The model's head.
        reference_nll: ``[B, S]``, for ``"excess"``.
        example_ids: int64 ``[B]``, for remembered scores.
        asked: Whether the selection is made from scores, now or once the ratio is below 1.

    Attributes:
        needed: Whether this forward's selection depends on the scores.
        score: ``[B, S]`` once :meth:`read`, where ``needed``.
        statistics: What the score was made of, where it was made of something.
    """

    def __init__(
        self,
        config: "CGGRModel",
        targets: Targets,
        readout: HeadReadout,
        *,
        reference_nll: Tensor | None,
        example_ids: Tensor | None,
        asked: bool,
    ) -> None:
        self._config = config
        self._passes: Engine = config._passes
        self._targets = targets
        self._readout = readout
        self._reference_nll = reference_nll
        self._example_ids = example_ids
        # Where every token is kept nobody asks for a score, but for the confidence that moves the ratio.
        self.needed = asked and (config.schedule.ratio < 1.0 or config.schedule.reads_confidence)
        router = config.router if asked else None
        self.learner = router if isinstance(router, LearnedRouter) else None
        self._memory = router if isinstance(router, RememberedScores) else None
        self.score: Tensor | None = None
        self.statistics: TokenStatistics | None = None
        self._at_full_depth = False
        self._hidden: Tensor | None = None
        self._router_metrics: dict[str, Tensor] = {}
        self._largest_batch: Monitor | None = None
        if self._memory is not None and torch.is_grad_enabled() and world_size() > 1:
            # Asked at the start of the forward, so that the answer is there when its observations are exchanged.
            self._largest_batch = Monitor()
            sizes = [torch.full((), size, device=targets.tokens.device) for size in targets.tokens.shape]
            self._largest_batch.post(largest_over_ranks(torch.stack(sizes)))

    def context_depth(self, engine: str) -> int | None:
        """Layers of the context pass that leaves what the scores are made of; ``None`` where none does."""
        if not self.needed:
            return None
        if self._config.router is None or (self.learner is not None and engine == "two_pass"):
            return self._passes.depth
        return self._config._own_depth if engine == "interleaved" else None

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Keep the hidden states that a learned router reads of the pass in the block."""
        if self.learner is None:
            yield
            return
        with self._passes.hidden_states(self.learner.depth) as seen:
            yield
        self._hidden = seen[0]

    @torch.no_grad()
    def scoring_pass(self, arguments: dict[str, Any]) -> Tensor | None:
        """What the score is made of, by a forward of its own: head values ``[B, S, ...]``, or hidden states kept."""
        if self.learner is not None:
            self._hidden = self._passes.hidden(arguments, depth=self.learner.depth)
        elif self.needed and self._config.router is None:
            return self._passes.plain(arguments)[0]
        return None

    @torch.no_grad()
    def read(self, arguments: dict[str, Any], values: Tensor | None) -> None:
        """Make the score, where it is needed.

        Args:
            arguments: Of the model's forward.
            values: Head values ``[B, S, ...]`` of the pass that scores, the context pass's or the model's own; ``None``
                where a router says it without.
        """
        if not self.needed:
            return
        router = self._config.router
        with self._timed():
            if self.learner is not None:
                assert self._hidden is not None  # left by a tapped pass
                self.score = self.learner(self._hidden, self._passes.embeddings(self._embeddable()))
                return
            if self._memory is not None:
                assert self._example_ids is not None  # checked
                self.score, self._router_metrics = self._memory.read(self._example_ids, self._targets.countable)
                return
            tokens = self._targets.tokens
            fields = fields_for(self._config.settings.scoring)
            if self._config.schedule.reads_confidence:
                fields |= {"confidence"}
            if router is None:
                fields |= {"nll"}
            self._at_full_depth = router is None
            if values is not None:
                self.statistics = self._readout.statistics(values.detach(), tokens, fields=fields)
            else:
                self.statistics = router_statistics(
                    router,
                    arguments,
                    tokens,
                    shape=tokens.shape,
                    fields=fields,
                    ignore_index=self._config.settings.ignore_index,
                )
            self.score = score(
                self.statistics, scoring=self._config.settings.scoring, reference_nll=self._reference_nll
            )

    def observe(self, seen: Observation) -> None:
        """Show the kept tokens to a router that learns from them or remembers them."""
        if (self.learner is None and self._memory is None) or not torch.is_grad_enabled():
            return
        with self._timed():
            if self.learner is not None:
                seen = seen.thinned(self.learner.observed_tokens, seed=self.learner.seed, draw=self.learner.updates)
            observed = seen.score(
                self._readout, scoring=self._config.settings.scoring, reference_nll=self._reference_nll
            )
            if self._memory is not None:
                assert self._example_ids is not None  # checked
                row, *slots = self._as_on_all_ranks(seen.row, seen.position, observed, seen.weight > 0)
                self._memory.observe(self._example_ids, row, *slots)
            elif self.learner is not None:
                assert self._hidden is not None  # left by a tapped pass
                self._router_metrics = self.learner.observe(
                    seen.gather(self._hidden).flatten(0, 1),
                    self._passes.embeddings(seen.gather(self._embeddable())).flatten(0, 1),
                    observed.flatten(),
                    seen.weight.flatten(),
                )

    def _as_on_all_ranks(self, row: Tensor, *slots: Tensor) -> list[Tensor]:
        """Rows ``[R]`` and slots ``[R, K]``, with zeros up to the shape of the largest batch of any rank."""
        largest = None if self._largest_batch is None else self._largest_batch.read(wait=True)
        if largest is None:
            return [row, *slots]
        rows, length = (int(size) for size in largest)
        more, longer = rows - row.shape[0], length - slots[0].shape[1]
        return [nn.functional.pad(row, (0, more)), *(nn.functional.pad(slot, (0, longer, 0, more)) for slot in slots)]

    def metrics(self, kept: Tensor) -> dict[str, Tensor]:
        """What is known of the scores.

        Args:
            kept: bool ``[B, S]``, the kept countable tokens.
        """
        countable = self._targets.countable
        count, kept_count = countable.sum().clamp(min=1), kept.sum().clamp(min=1)
        metrics = dict(self._router_metrics)
        if self.score is not None:
            dropped = countable & ~kept
            metrics["score_kept"] = (self.score * kept).sum() / kept_count
            metrics["score_dropped"] = (self.score * dropped).sum() / dropped.sum().clamp(min=1)
        if self.statistics is not None:
            if self.statistics.gradnorm is not None:
                squares = self.statistics.gradnorm.square()
                metrics["gradnorm_kept"] = (squares * kept).sum() / (squares * countable).sum().clamp(min=1e-30)
            if self.statistics.confidence is not None:
                metrics["confidence"] = (self.statistics.confidence * countable).sum() / count
            if self._at_full_depth and self.statistics.nll is not None:
                metrics["full_loss"] = (self.statistics.nll * countable).sum() / count
        return metrics

    def _embeddable(self) -> Tensor:
        """The targets, with some token in place of what is not countable."""
        return torch.where(self._targets.countable, self._targets.tokens, 0)

    def _timed(self) -> AbstractContextManager[None]:
        stopwatch = self._config.scoring_stopwatch
        return nullcontext() if stopwatch is None else stopwatch.measure(self._targets.countable.device)
