"""The order of the batches: a pure function of the seed and the batch's number."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cggr_train.errors import InputError


class Batches:
    """Batches of fixed-length sequences cut from a stream of token ids.

    The stream is cut into ``len(stream) // length`` sequences; every epoch uses a new order drawn from ``(seed,
    epoch)``. Batch ``i`` depends only on these numbers, so a resumed run, or another method at the same seed, gets the
    same text in the same order. Batches of half the size hold the same sequences in the same order, half as many at a
    time.

    Args:
        stream: Token ids, shape ``[N]``, any integer dtype.
        length: Tokens of a sequence.
        batch_size: Sequences of a batch.
        seed: Seed of the order.

    Raises:
        InputError: If a size is below 1, or the stream is shorter than one sequence.

    Example:
        >>> batches = Batches(np.arange(12), length=4, batch_size=2, seed=0)
        >>> batches.get(0).shape
        torch.Size([2, 4])
    """

    def __init__(self, stream: np.ndarray, *, length: int, batch_size: int, seed: int) -> None:
        if length < 2 or batch_size < 1:
            raise InputError(f"length must be at least 2 and batch_size at least 1, got {length} and {batch_size}")
        self.num_sequences = len(stream) // length
        if self.num_sequences == 0:
            raise InputError(f"the text has {len(stream):,} tokens, fewer than one sequence of {length:,} (--length)")
        self.sequences = stream[: self.num_sequences * length].reshape(self.num_sequences, length)
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def get(self, number: int) -> Tensor:
        """Token ids of batch ``number``, int64 ``[batch_size, length]``; it may span two epochs.

        Unsupervised tokens are encoded as in :mod:`cggr_train.data.supervision`.
        """
        return torch.from_numpy(self.sequences[self._rows(number)].astype(np.int64))

    def example_ids(self, number: int) -> Tensor:
        """The sequence in each row of batch ``number``, int64 ``[batch_size]``, numbered the same in every epoch."""
        return torch.tensor(self._rows(number), dtype=torch.int64)

    def epochs(self, number: int) -> float:
        """Epochs completed before batch ``number``."""
        return number * self.batch_size / self.num_sequences

    def _rows(self, number: int) -> list[int]:
        first = number * self.batch_size
        return [self._row(position) for position in range(first, first + self.batch_size)]

    def _row(self, position: int) -> int:
        epoch, place = divmod(position, self.num_sequences)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, generator.permutation(self.num_sequences)
        return int(self._order[place])


def in_order(stream: np.ndarray, *, length: int, batch_size: int, limit: int | None = None) -> list[Tensor]:
    """Every sequence once, in text order: the batches of an evaluation.

    Args:
        stream: Token ids, shape ``[N]``.
        length: Tokens of a sequence.
        batch_size: Sequences of a batch; the last one may be smaller.
        limit: At most this many sequences, spread evenly over the stream.

    Returns:
        Tensors int64 ``[<= batch_size, length]``.
    """
    count = len(stream) // length
    rows = np.arange(count)
    if limit is not None and limit < count:
        rows = np.linspace(0, count - 1, limit).round().astype(np.int64)
    sequences = stream[: count * length].reshape(count, length)
    return [
        torch.from_numpy(sequences[rows[start : start + batch_size]].astype(np.int64))
        for start in range(0, len(rows), batch_size)
    ]
