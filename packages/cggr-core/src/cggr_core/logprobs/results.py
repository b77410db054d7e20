"""The results of routed passes that a loss is computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from cggr_core.selection import Selection

__all__ = ["RoutedHidden", "TokenLogprobs"]


class TokenLogprobs(NamedTuple):
    """Log-probabilities in target alignment: position t is about the prediction of the token at t + 1.

    Attributes:
        logprob: ln p of each target, in nats, ``[B, S]`` float32 (float64 for float64 models); with a gradient at the
            kept positions, 0 or a constant at the others.
        entropy: -Σ p ln p in nats, as ``logprob``; ``None`` if not requested.
        keep: bool ``[B, S]``, the kept positions.
        weight: float32 ``[B, S]``: 1 or the selection's weight at kept positions; 0 at the others.
        auxiliary_loss: The expert routers' balancing loss over the tokens of the backward pass, 0-dim, if the model's
            config requests it (``output_router_logits``); else ``None``.
    """

    logprob: Tensor
    entropy: Tensor | None
    keep: Tensor
    weight: Tensor
    auxiliary_loss: Tensor | None = None


@dataclass(frozen=True)
class RoutedHidden:
    """Final hidden states of the kept tokens, for a custom head and loss.

    Attributes:
        hidden: ``[B, K, H]`` in the model's dtype: the input of the language-model head, with gradients; 0, without a
            gradient, in slots without a kept token.
        selection: Which positions the slots hold: ``index`` ``[B, K]``, ``valid`` ``[B, K]``, ``weight`` ``[B, K]`` (1
            for kept tokens of a mask), and ``gather`` for other tensors ``[B, S, ...]``.
        auxiliary_loss: As in :class:`TokenLogprobs`.
    """

    hidden: Tensor
    selection: Selection
    auxiliary_loss: Tensor | None = None
