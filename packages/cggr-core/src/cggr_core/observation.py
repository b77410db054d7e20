"""What a training forward showed of its kept tokens: their true scores, for routers that learn or remember them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cggr_core.randomness import uniform
from cggr_core.readout import HeadReadout
from cggr_core.scoring import fields_for, score


@dataclass(frozen=True)
class Observation:
    """Kept tokens, as rows of slots.

    Attributes:
        values: Head values ``[R, K, ...]``.
        targets: int64 ``[R, K]``, the ignore index where nothing counts.
        weight: float32 ``[R, K]``, 1 / inclusion probability; 0 in slots that are not kept tokens.
        row: int64 ``[R]``, rows of the batch.
        position: int64 ``[R, K]``, positions in them.
    """

    values: Tensor
    targets: Tensor
    weight: Tensor
    row: Tensor
    position: Tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """``[R, K, ...]``, the slots of a tensor ``[B, S, ...]`` of the batch."""
        return tensor[self.row[:, None], self.position]

    def thinned(self, tokens: int, *, seed: int, draw: Tensor) -> "Observation":
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
    def score(self, readout: HeadReadout, *, scoring: str, reference_nll: Tensor | None) -> Tensor:
        """The true scores, float32 ``[R, K]``.

        Args:
            readout: The model's head.
            scoring: Which score.
            reference_nll: ``[B, S]``, for ``"excess"``.
        """
        statistics = readout.statistics(self.values.detach(), self.targets, fields=fields_for(scoring))
        if reference_nll is not None:
            reference_nll = self.gather(reference_nll)
        return score(statistics, scoring=scoring, reference_nll=reference_nll)
