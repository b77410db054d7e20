"""Targets: labels moved to the position that predicts them, and checked."""

from typing import NamedTuple

import torch
from torch import Tensor

from cggr_core.checks import bad_targets_message, count_bad_targets, values_are_free


class Targets(NamedTuple):
    """Aligned targets.

    Attributes:
        tokens: int64 ``[B, S]``; what the logits at each position predict, ``ignore_index`` where nothing counts.
        countable: bool ``[B, S]``.
        invalid: 0-dim int64, labels outside the vocabulary (they are not countable).
    """

    tokens: Tensor
    countable: Tensor
    invalid: Tensor


def align_labels(labels: Tensor, *, shifted: bool, vocab_size: int, ignore_index: int = -100) -> Targets:
    """Turn Hugging Face labels into targets.

    Args:
        labels: int64 ``[B, S]``, ``ignore_index`` where nothing is to be learned.
        shifted: Whether position t predicts label t + 1 (causal models) or label t (masked models).
        vocab_size: Valid labels are 0 to ``vocab_size - 1``.
        ignore_index: Label that is never scored, selected or counted.

    Returns:
        The targets. With ``shifted``, the last position predicts nothing.

    Raises:
        ValueError: If the shape is wrong, or labels on the CPU are outside the vocabulary. On other devices that
            would be a host read; the count is in ``invalid`` instead.
        TypeError: If labels are not int64.

    Example:
        >>> align_labels(torch.tensor([[5, 6, -100]]), shifted=True, vocab_size=10).tokens
        tensor([[   6, -100, -100]])
    """
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be torch.int64, got {labels.dtype}; use labels.long()")
    if labels.dim() != 2:
        raise ValueError(f"labels must have shape [B, S], got {list(labels.shape)}")
    tokens = labels
    if shifted:
        tokens = torch.cat([labels[:, 1:], labels.new_full((labels.shape[0], 1), ignore_index)], dim=1)
    invalid = count_bad_targets(tokens, vocab_size, ignore_index)
    if values_are_free(labels) and invalid:
        raise ValueError(bad_targets_message("labels", int(invalid), vocab_size, ignore_index, tokens))
    outside = (tokens < 0) | (tokens >= vocab_size)
    tokens = torch.where(outside, ignore_index, tokens)
    return Targets(tokens, tokens != ignore_index, invalid)
