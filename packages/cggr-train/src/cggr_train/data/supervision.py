"""Rows with unsupervised tokens: an unsupervised token id is stored as −1 − id.

A single array then carries both the tokens and the labels of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""Label of an unsupervised token, as in all Hugging Face libraries."""


class Supervised(NamedTuple):
    """What a model is given.

    Attributes:
        input_ids: Token ids, int64 ``[B, S]``.
        labels: The same where a token is supervised, −100 elsewhere.
    """

    input_ids: Tensor
    labels: Tensor


def unsupervised(ids: Tensor) -> Tensor:
    """Encode token ids as unsupervised, or decode them; its own inverse.

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
    """Number of supervised tokens with a token before them to predict them from; int64 scalar."""
    return (rows[:, 1:] >= 0).sum()
