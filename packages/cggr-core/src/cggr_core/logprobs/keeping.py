"""Which tokens a loss uses: keep masks for policy gradients, distillation and other custom losses.

All masks are in target alignment: position t is about the prediction of the token at t + 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_core.checks import check_choice, check_float, check_ratio, check_same_device, check_shape, values_are_free
from cggr_core.selection import Selection, check_mask
from cggr_core.settings import SCOPES
from cggr_core.slots import slots_in_steps
from cggr_core.strategies import select

__all__ = ["keep_nonzero", "keep_random", "keep_tokens", "keep_top_entropy"]


def keep_tokens(mask: Tensor) -> Tensor:
    """The positions that predict the tokens of a mask: the mask moved one to the left.

    Datasets and trainers mark the tokens themselves (a completion mask, or ``labels != -100``), and a causal model
    predicts the token at t + 1 with its output at t.

    Args:
        mask: bool ``[B, S]``, the tokens whose log-probabilities you need. Nothing predicts the first token of a row,
            so its entry has no effect.

    Returns:
        bool ``[B, S]`` in target alignment, false at the last position.

    Raises:
        TypeError: If ``mask`` is not bool.
        ValueError: If its shape is not ``[B, S]``.

    Example:
        >>> prompt, completion = torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[True, True, False]])
        >>> keep_tokens(torch.cat([prompt, completion], dim=1)).int()
        tensor([[0, 0, 1, 1, 0, 0]], dtype=torch.int32)
    """
    check_mask("mask", mask)
    return torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)


def keep_top_entropy(entropy: Tensor, mask: Tensor, ratio: float, *, scope: str = "batch") -> Tensor:
    """The positions of a mask at which the model is least certain (Wang et al. 2025, arXiv 2506.01939).

    Args:
        entropy: float ``[B, S]`` in nats, as in :class:`TokenLogprobs`.
        mask: bool ``[B, S]``, the positions to choose from.
        ratio: Share to keep, in (0, 1]: ``round(ratio * n)`` of the n positions, at least one if there is one; ties go
            to the lower position.
        scope: ``"batch"`` for the share of all positions of the batch, ``"row"`` for that of each row.

    Returns:
        bool ``[B, S]``.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If shapes or devices disagree, the ratio is outside (0, 1], the scope is unknown, or (on CPU) an
            entropy in the mask is NaN.

    Example:
        >>> entropy = torch.tensor([[0.1, 2.0, 1.0, 3.0]])
        >>> keep_top_entropy(entropy, torch.tensor([[True, True, True, False]]), 0.3)
        tensor([[False,  True, False, False]])
    """
    check_choice("scope", scope, SCOPES)
    check_float("entropy", entropy)
    check_mask("mask", mask, entropy, "entropy")
    return select(entropy, mask, ratio=ratio, selection="topk", scope=scope).mask


def keep_random(
    mask: Tensor,
    ratio: float,
    *,
    seed: int = 0,
    draw: int | Tensor = 0,
    first_row: int = 0,
    capacity: int | None = None,
) -> Selection:
    """A random share of the positions of each row, weighted by 1 / inclusion probability.

    A sum over the kept tokens times their weights is an unbiased estimate of the sum over all of the mask; the
    weights come back in :class:`TokenLogprobs`.

    Args:
        mask: bool ``[B, S]``, the positions to choose from.
        ratio: Share to keep, in (0, 1]: ``round(ratio * n)`` of a row's n positions, at least one if there is one.
        seed: Seed of the draws.
        draw: Number of the draw, an int or a 0-dim int64 tensor; count it up with every step.
        first_row: Number of the batch's first row among the rows of that draw, so that micro-batches and ranks that
            share a draw keep the same tokens as one batch of all rows.
        capacity: Slots of each row. ``None`` reads the largest row count of the mask from the device (a
            synchronisation) and takes ``ratio`` of it, rounded up so that shapes repeat.

    Returns:
        A selection; its ``mask`` is the bool ``[B, S]``.

    Raises:
        TypeError: If a dtype or the type of an argument is wrong.
        ValueError: If the shape is wrong or the ratio is outside (0, 1].

    Example:
        >>> kept = keep_random(torch.ones(1, 8, dtype=torch.bool), 0.25)
        >>> kept.mask.sum(), kept.weight[kept.valid]
        (tensor(2), tensor([4., 4.]))
    """
    check_mask("mask", mask)
    if capacity is None:
        largest = int(mask.sum(1).max()) if mask.numel() else 0
        capacity = slots_in_steps(round(check_ratio("ratio", ratio) * largest) + 1, mask.shape[1])
    score = torch.zeros(mask.shape, device=mask.device)
    return select(
        score,
        mask,
        ratio=ratio,
        selection="random",
        capacity=capacity,
        seed=seed,
        draw=draw,
        first_row=first_row,
    )


def keep_nonzero(advantages: Tensor, mask: Tensor) -> Tensor:
    """The positions of a mask whose advantage is not 0; dropping the others leaves a policy gradient unchanged.

    This holds if the loss of a token is proportional to its advantage: a KL or entropy term at the dropped tokens is
    lost.

    Args:
        advantages: float ``[B]``, one per row, or ``[B, S]``.
        mask: bool ``[B, S]``.

    Returns:
        bool ``[B, S]``.

    Raises:
        TypeError: If a dtype is wrong.
        ValueError: If shapes or devices disagree, or (on CPU) an advantage is NaN.

    Example:
        >>> keep_nonzero(torch.tensor([0.0, -1.0]), torch.ones(2, 2, dtype=torch.bool))
        tensor([[False, False],
                [ True,  True]])
    """
    check_mask("mask", mask)
    check_float("advantages", advantages)
    check_same_device("advantages", advantages, "mask", mask)
    if values_are_free(advantages) and (count := int(advantages.isnan().sum())):
        raise ValueError(
            f"advantages has {count} NaN of {advantages.numel()} values; a group with a single completion has no "
            "standard deviation to divide by"
        )
    if tuple(advantages.shape) != tuple(mask.shape[:1]):
        check_shape("advantages", advantages, mask.shape, "that of mask, or [B], one for each row")
        return mask & (advantages != 0)
    return mask & (advantages != 0)[:, None]
