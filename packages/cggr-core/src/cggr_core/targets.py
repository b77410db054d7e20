"""Targets: labels moved to the position that predicts them, and checked."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cggr_core.checks import bad_targets_message, count_bad_targets, values_are_free


@dataclass(frozen=True)
class Targets:
    """Labels as targets, aligned when they are first read.

    On a GPU this happens after the context pass has been launched, so that a step starts with the model and not with
    small kernels.

    Attributes:
        labels: int64 ``[B, S]``.
        shifted: Whether position t predicts label t + 1 (causal models) or label t (masked models).
        vocab_size: Valid labels are 0 to ``vocab_size - 1``.
        ignore_index: Label that is never scored, selected or counted.
    """

    labels: Tensor
    shifted: bool
    vocab_size: int
    ignore_index: int

    @cached_property
    def tokens(self) -> Tensor:
        """What the logits at each position predict, int64 ``[B, S]``; ``ignore_index`` where nothing counts."""
        outside = (self._moved < 0) | (self._moved >= self.vocab_size)
        return torch.where(outside, self.ignore_index, self._moved)

    @cached_property
    def countable(self) -> Tensor:
        """Bool ``[B, S]``."""
        return self.tokens != self.ignore_index

    @cached_property
    def invalid(self) -> Tensor:
        """Labels outside the vocabulary, which are not countable, 0-dim int64."""
        return count_bad_targets(self._moved, self.vocab_size, self.ignore_index)

    @cached_property
    def _moved(self) -> Tensor:
        return at_predictors(self.labels, self.ignore_index) if self.shifted else self.labels


def at_predictors(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels ``[B, S]`` of a causal model at the positions that predict them: the last one predicts nothing."""
    nothing = labels.new_full((labels.shape[0], 1), ignore_index)
    return torch.cat([labels[:, 1:], nothing], dim=1)


def align_labels(labels: Tensor, *, shifted: bool, vocab_size: int, ignore_index: int = -100) -> Targets:
    """Turn Hugging Face labels into targets.

    Args:
        labels: int64 ``[B, S]``, ``ignore_index`` where there is nothing to learn.
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
    targets = Targets(labels, shifted, vocab_size, ignore_index)
    if values_are_free(labels) and targets.invalid:
        moved = labels[:, 1:] if shifted else labels
        raise ValueError(bad_targets_message("labels", int(targets.invalid), vocab_size, ignore_index, moved))
    return targets
