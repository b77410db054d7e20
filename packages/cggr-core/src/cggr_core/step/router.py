"""The router protocol: what a step asks for, what scores can be made from, and what a router observes afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from cggr_core.randomness import uniform
from cggr_core.readout import HeadReadout
from cggr_core.scoring import fields_for, score
from cggr_core.settings import RoutingSettings
from cggr_core.statistics import TokenStatistics
from cggr_core.step.batch import StepBatch

if TYPE_CHECKING:
    from cggr_core.routing import Engine


@runtime_checkable
class Router(Protocol):
    """Whatever produces scores before the gradient pass."""

    @property
    def depth(self) -> int | None:
        """Number of layers of the trained model below the scores; ``None`` if the scores do not use it."""
        ...

    @property
    def reads_hidden(self) -> bool:
        """Whether the scores use the hidden states above those layers rather than the head's output."""
        ...

    @property
    def gives_confidence(self) -> bool:
        """Whether the scores come with the model's confidence at every token."""
        ...

    def attach(self, *, layers: int, hidden_size: int, embedding_size: int) -> None:
        """Learn the sizes of the model; called once, when a CGGRModel is made."""
        ...

    def prepare(self, batch: StepBatch) -> None:
        """Called first in a step: raise unless the batch has what the router needs, and nothing it would ignore."""
        ...

    def score(self, request: ScoreRequest) -> Scores:
        """The scores of all tokens; called without gradients, if the selection depends on them."""
        ...

    def observe(self, seen: Observation) -> dict[str, Tensor]:
        """Learn from the kept tokens; called last in a step, after the loss. Returns metrics."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; empty for nothing."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Continue from :meth:`state_dict`."""
        ...


@dataclass(frozen=True)
class ScoreRequest:
    """What scores can be made from.

    Attributes:
        settings: Of the step.
        batch: The batch.
        engine: The passes over the model.
        readout: The model's head.
        fields: Which of the router's statistics are needed.
        depth: Number of layers run over all tokens; 0 for none.
        values: Head values ``[B, S, ...]`` above ``depth`` layers; ``None`` if the head was not run.
        hidden: Input ``[B, S, H]`` of the layer at the router's depth, if it reads that.
    """

    settings: RoutingSettings
    batch: StepBatch
    engine: Engine
    readout: HeadReadout
    fields: frozenset[str]
    depth: int
    values: Tensor | None
    hidden: Tensor | None

    def statistics(self, fields: frozenset[str]) -> TokenStatistics:
        """Statistics of every token from the head values."""
        assert self.values is not None  # the routers that read the head had it run
        tokens, precision = self.batch.targets.tokens, self.settings.precision_of_scores
        return self.readout.statistics(self.values.detach(), tokens, fields=fields, precision=precision)

    def scores(self, statistics: TokenStatistics, *, full_depth: bool = False) -> Scores:
        """Scores from token statistics, as set by the settings."""
        made = score(statistics, scoring=self.settings.scoring, reference_nll=self.batch.reference_nll)
        return Scores(made, statistics, full_depth)


@dataclass(frozen=True)
class Scores:
    """The scores of a batch.

    Attributes:
        score: float32 ``[B, S]``; ``None`` if nothing was scored.
        statistics: The statistics they were computed from, if any.
        full_depth: Whether the statistics are the whole model's.
        metrics: The router's metrics.
    """

    score: Tensor | None = None
    statistics: TokenStatistics | None = None
    full_depth: bool = False
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Observation:
    """Kept tokens of a step, as rows of slots.

    Attributes:
        settings: Of the step.
        batch: The batch.
        engine: The passes over the model.
        readout: The model's head.
        values: Head values ``[R, K, ...]``.
        targets: int64 ``[R, K]``, the ignore index where nothing counts.
        weight: float32 ``[R, K]``, 1 / inclusion probability; 0 in slots that are not kept tokens.
        row: int64 ``[R]``, rows of the batch.
        position: int64 ``[R, K]``, positions in them.
        hidden: As :class:`ScoreRequest` has it.
    """

    settings: RoutingSettings
    batch: StepBatch
    engine: Engine
    readout: HeadReadout
    values: Tensor
    targets: Tensor
    weight: Tensor
    row: Tensor
    position: Tensor
    hidden: Tensor | None

    def gather(self, tensor: Tensor) -> Tensor:
        """``[R, K, ...]``, the slots of a tensor ``[B, S, ...]`` of the batch."""
        return tensor[self.row[:, None], self.position]

    def thinned(self, tokens: int, *, seed: int, draw: Tensor) -> Observation:
        """About ``tokens`` slots, every one with the same probability: evenly spaced from a random start.

        Args:
            tokens: Slots to leave in all rows together; at least one is left in each row.
            seed: Of the start.
            draw: Number of the draw, 0-dim int64.
        """
        rows, slots = self.targets.shape
        fewer = max(1, tokens // max(1, rows))
        if fewer >= slots:
            return self
        start = uniform((), seed=seed, draw=draw, device=self.targets.device)
        steps = torch.arange(fewer, device=self.targets.device)
        chosen = ((steps + start) * (slots / fewer)).long().clamp(max=slots - 1)
        parts = {name: getattr(self, name)[:, chosen] for name in ("values", "targets", "weight", "position")}
        return replace(self, **parts)

    @torch.no_grad()
    def scores(self) -> Tensor:
        """The true scores, float32 ``[R, K]``."""
        scoring, reference_nll = self.settings.scoring, self.batch.reference_nll
        statistics = self.readout.statistics(self.values.detach(), self.targets, fields=fields_for(scoring))
        if reference_nll is not None:
            reference_nll = self.gather(reference_nll)
        return score(statistics, scoring=scoring, reference_nll=reference_nll)
