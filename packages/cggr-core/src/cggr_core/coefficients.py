"""What each kept token's nll counts in a loss, and what the sum is divided by."""

import torch
from torch import Tensor

from cggr_core.checks import check_float, check_num_items, check_same_device, check_shape, values_are_free
from cggr_core.selection import Selection

__all__ = ["all_coefficients", "divisor", "loss_coefficients"]


def loss_coefficients(
    selection: Selection,
    countable: Tensor,
    *,
    token_weight: Tensor | None = None,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Factor of each slot's nll in the loss: ``weight * token_weight / (num_items or the countable tokens)``.

    Args:
        selection: The kept tokens.
        countable: [B, S] bool, the tokens that have a target.
        token_weight: [B, S] factor of the caller on each token's loss; None for 1.
        num_items: What the sum is divided by; None for the number of countable tokens of this batch. Under gradient
            accumulation: the countable tokens of all micro-batches.

    Returns:
        float32 [B, K], or [1, K] for a selection over the whole batch; 0 in slots that are not kept.

    Raises:
        TypeError: If ``num_items`` is not a number.
        ValueError: If a shape does not match, or ``num_items`` is not above 0.

    Example:
        >>> mask = torch.tensor([[True, True, False, False]])
        >>> selection = Selection.from_mask(mask, capacity=2)
        >>> loss_coefficients(selection, torch.ones_like(mask))
        tensor([[0.5000, 0.5000]])
    """
    check_shape("countable", countable, selection.shape, "that of the selection's score")
    check_num_items(num_items)
    coefficients = selection.weight
    if token_weight is not None:
        check_float("token_weight", token_weight)
        check_shape("token_weight", token_weight, selection.shape, "one per token")
        check_same_device("token_weight", token_weight, "countable", countable)
        # Masked, not multiplied: the weight of a token that is not kept may hold any value.
        coefficients = coefficients * selection.gather(token_weight).masked_fill(~selection.valid, 0.0)
    return (coefficients / divisor(num_items, countable)).to(torch.float32)


def all_coefficients(countable: Tensor, token_weight: Tensor | None, num_items: Tensor | float | None) -> Tensor:
    """Coefficients [1, N] of the plain mean over all countable tokens."""
    everything = Selection.from_mask(countable, countable=countable, capacity=countable.shape[1])
    coefficients = loss_coefficients(everything, countable, token_weight=token_weight, num_items=num_items)
    return coefficients.reshape(1, -1)


def divisor(num_items: Tensor | float | None, countable: Tensor) -> Tensor | float:
    """What a loss is divided by: never 0, so that the loss is 0 and not NaN if nothing is countable.

    Args:
        num_items: Countable tokens of the whole optimiser step; None for those of this batch.
        countable: [B, S] bool, the tokens that have a target.

    Raises:
        ValueError: If ``num_items`` is 0 although tokens are countable, and reading their values costs nothing.
            (Otherwise the loss is infinite.)
    """
    if num_items is None:
        return countable.sum().clamp(min=1)
    if not isinstance(num_items, Tensor) and num_items != 0:
        return num_items
    nothing = countable.any().logical_not()
    if values_are_free(countable) and not bool(nothing | (torch.as_tensor(num_items) != 0)):
        raise ValueError(f"num_items must be above 0, got 0: the batch has {int(countable.sum())} tokens with a target")
    return num_items + nothing * (num_items == 0)
