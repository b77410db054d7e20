"""Rows of which only some tokens are supervised: an unsupervised token id stands there as −1 − id.

One array then holds what a row is made of and what is learned from it, wherever rows go.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""Label of a token that nothing is learned from, as everywhere in Hugging Face's libraries."""


class Supervised(NamedTuple):
    """What a model is given.

    Attributes:
        input_ids: Token ids, int64 ``[B, S]``.
        labels: The same where a token is supervised, −100 elsewhere.
    """

    input_ids: Tensor
    labels: Tensor


def unsupervised(ids: Tensor) -> Tensor:
    """Token ids as they stand in a row whose loss they have no part in, and back again.

    Example:
        >>> unsupervised(torch.tensor([0, 7])), unsupervised(torch.tensor([-1, -8]))
        (tensor([-1, -8]), tensor([0, 7]))
    """
    return -1 - ids


def split_supervised(rows: Tensor) -> Supervised:
    """Token ids and labels of rows; nothing is read by the host.

    Args:
        rows: int64 ``[B, S]``; a plain text has no number below zero, and all of it is supervised.

    Example:
        >>> ids, labels = split_supervised(torch.tensor([[-6, 8]]))
        >>> ids.tolist(), labels.tolist()
        ([[5, 8]], [[-100, 8]])
    """
    given = rows < 0
    return Supervised(torch.where(given, unsupervised(rows), rows), rows.masked_fill(given, IGNORED))


def count_targets(rows: Tensor) -> Tensor:
    """Supervised tokens that have a token before them, which they are predicted from; int64 scalar."""
    return (rows[:, 1:] >= 0).sum()
