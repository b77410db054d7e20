"""Held-out loss of the plain model over all tokens, independent of the training method."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from cggr_train.data import IGNORED, count_targets, split_supervised


@torch.no_grad()
def heldout_loss(
    model: torch.nn.Module,
    batches: Sequence[Tensor],
    *,
    device: torch.device,
    bfloat16: bool = False,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> float:
    """Mean negative log-likelihood per predicted token, in nats.

    Args:
        model: A Hugging Face causal language model; evaluated in ``eval()`` mode, which is restored afterwards.
        batches: Token ids, int64 ``[B, S]`` each; every supervised token except a first one is predicted.
        device: Where the model is.
        bfloat16: Evaluate under bfloat16 autocast.
        reduce: Sums a float64 CPU tensor over all ranks, if each evaluates its share of the batches.

    Raises:
        ValueError: If there is no token to predict.
    """
    training = model.training
    model.eval()
    total, count = torch.zeros((), dtype=torch.float64, device=device), 0
    try:
        for batch in batches:
            input_ids, labels = split_supervised(batch.to(device))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
                logits = model(input_ids=input_ids, use_cache=False).logits
            predicts = labels[:, 1:] != IGNORED  # few, if prompts are masked; only these are converted to float32
            losses = functional.cross_entropy(
                logits[:, :-1][predicts].float(), labels[:, 1:][predicts], reduction="sum"
            )
            total += losses.double()
            count += int(count_targets(batch))
    finally:
        model.train(training)
    loss, tokens = reduce(torch.tensor([total.item(), count], dtype=torch.float64)).tolist()
    if tokens == 0:
        raise ValueError("batches holds no token to predict; give at least one sequence of two tokens")
    return loss / tokens
