"""The batches that every class is tried on: three lengths, each whole, padded and packed."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.sweep.tiny import FIRST_ID, LAST_ID

LENGTHS = (9, 33, 96)
LAYOUTS = ("whole", "padded", "packed")
KEPT = 0.3


@dataclass(frozen=True)
class Case:
    """A batch.

    Attributes:
        layout: One of :data:`LAYOUTS`.
        labels: int64 ``[B, S]``.
        inputs: Of the model's forward.
    """

    layout: str
    labels: Tensor
    inputs: dict[str, Any]

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.labels.shape[1]


def cases(lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0) -> Iterator[Case]:
    """The batches, two rows each: padded ones have a row padded on the left and one on the right."""
    for length in lengths:
        generator = torch.Generator().manual_seed(seed + length)
        ids = torch.randint(FIRST_ID, LAST_ID + 1, (2, length), generator=generator)
        labels = ids.clone()
        labels[0, : length // 4] = -100
        yield Case("whole", labels, {"input_ids": ids})

        padding = length // 3
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        mask[1, length - padding :] = 0
        padded = ids.masked_fill(mask == 0, 0)
        yield Case("padded", padded.masked_fill(mask == 0, -100), {"input_ids": padded, "attention_mask": mask})

        cut = length // 2
        positions = torch.stack(
            [torch.cat([torch.arange(part), torch.arange(length - part)]) for part in (cut, max(cut // 2, 2))]
        )
        packed = ids.masked_fill(positions == 0, -100)
        yield Case("packed", packed, {"input_ids": ids, "position_ids": positions})


def kept_tokens(countable: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random part of the countable tokens, fewer in the first row, with uneven weights; both ``[B, S]``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(countable.shape, generator=generator).masked_fill(~countable, -1.0)
    most = max(int(countable.shape[1] * KEPT), 2)
    mask = torch.zeros_like(countable).scatter_(1, noise.topk(most, dim=1).indices, True) & countable
    mask[0] &= mask[0].cumsum(0) < most
    return mask, torch.rand(countable.shape, generator=generator) + 0.5


def one_document_a_row(case: Case, *per_token: Tensor) -> tuple[dict[str, Any], list[Tensor]]:
    """A packed batch with every document in a row of its own, padded on the right; and other tensors likewise."""
    positions = case.inputs["position_ids"]
    pieces = []
    for row, starts in enumerate(positions == 0):
        ends = [*starts.nonzero().flatten().tolist(), case.length]
        pieces += [(row, start, end) for start, end in pairwise(ends)]
    longest = max(end - start for _, start, end in pieces)

    def apart(tensor: Tensor) -> Tensor:
        return torch.stack([F.pad(tensor[row, start:end], (0, longest - end + start)) for row, start, end in pieces])

    inputs = {name: apart(tensor) for name, tensor in case.inputs.items()}
    inputs["attention_mask"] = apart(torch.ones_like(positions))
    return inputs, [apart(tensor) for tensor in per_token]
