"""Which supervised tokens a way of `benchmarks.frontier` keeps, if not all of them, and in which layers it routes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

UNITS = ("tokens", "sentences", "window")
"""Units that can be kept together, besides stretches of a fixed number of tokens."""


def line_ends(tokenizer: Any) -> Tensor:
    """Which tokens of a vocabulary end a line, bool ``[V]``: each sentence of an answer is on its own line."""
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    return torch.tensor(["\n" in text for text in texts])


def keep_part(
    predicts: Tensor, targets: Tensor, *, unit: str | int, parts: int, ends: Tensor | None, epoch: Tensor | int
) -> Tensor:
    """One in ``parts`` of the supervised tokens of each row, in whole units as far as possible.

    Every row keeps the same share, rounded up: units are taken in random order, and only the beginning of the last one.
    The host reads nothing, so that the step can be recorded.

    Args:
        predicts: bool ``[B, S]``, positions whose next token is supervised.
        targets: int64 ``[B, S]``, that next token.
        unit: ``"tokens"``; a number of neighbouring tokens, the first unit beginning at random; ``"sentences"``, each
            with the end of its line; or ``"window"``: the tokens are cut into ``parts``, and each epoch keeps the next
            part, starting at a different one in each row.
        parts: Number of supervised tokens over the number kept.
        ends: See :func:`line_ends`; for sentences.
        epoch: Of the rows; for the window. 0-dim int64 where it is on the device.

    Returns:
        bool ``[B, S]``.
    """
    rows, length = predicts.shape
    count = predicts.sum(1, keepdim=True)
    rank = predicts.cumsum(1) - 1
    if unit == "window":
        number = (rank * parts).div(count.clamp(min=1), rounding_mode="floor")
        begins = (targets * predicts).sum(1, keepdim=True)  # a number that depends on the row
        order = ((number - begins - epoch) % parts).double()
    else:
        if unit == "sentences":
            assert ends is not None
            ended = (ends[targets] & predicts).cumsum(1)
            number = ended - (ends[targets] & predicts).long()
        else:
            size = 1 if unit == "tokens" else int(unit)
            offset = torch.randint(size, (rows, 1), device=predicts.device)
            number = (rank + offset).div(size, rounding_mode="floor")
        draws = torch.rand(rows, length + 1, device=predicts.device, dtype=torch.float64)
        order = draws.gather(1, number.clamp(min=0))
    # Units in random order, and the tokens of a unit in text order.
    place = order.masked_fill(~predicts, torch.inf).argsort(dim=1, stable=True).argsort(dim=1)
    return predicts & (place < (count + parts - 1).div(parts, rounding_mode="floor"))


def route_layers(
    layers: Iterable[nn.Module], share: tuple[float, float], kept: Callable[[], Tensor | None]
) -> list[RemovableHandle]:
    """Let some layers pass gradients only to the kept positions of their input, as ``kv`` does.

    The gradient is that of ``kv`` in these layers and of ``exact`` in the others; the time of the pass is not.

    Args:
        layers: All, in their order.
        share: First and last of the routed ones, as shares of the depth.
        kept: Returns the kept positions, bool ``[B, S]``; None if all are kept.

    Returns:
        A function that removes the hooks.
    """
    every = list(layers)
    first, last = (round(part * len(every)) for part in share)

    def cut(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, which = arguments[0], kept()
        return arguments if which is None else (torch.where(which[..., None], hidden, hidden.detach()), *arguments[1:])

    return [layer.register_forward_pre_hook(cut) for layer in every[first:last]]


@contextmanager
def routed_layers(layers: Iterable[nn.Module], share: tuple[float, float], kept: Tensor) -> Iterator[None]:
    """:func:`route_layers` within a block."""
    handles = route_layers(layers, share, lambda: kept)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
