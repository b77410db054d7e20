"""Attention masks for queries that are a subset of the positions, on any Hugging Face backend that takes a mask.

Models build their masks through one registry of mask builders. For the length of a pass, each builder is replaced
by one that asks the same question about other rows: query ``i`` of row ``b`` stands at ``position[b, i]``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MaskFunction = Callable[[Any, Any, Any, Any], Any]


@dataclass(frozen=True)
class Visibility:
    """What a query may attend to besides the model's own pattern.

    Attributes:
        position: Row index of every query, ``[B, Q]`` int64; ``None`` where query ``i`` is row ``i``.
        length: Number of keys ``S``.
        padding: ``[B, S]``, false or 0 at padding; ``None`` without padding.
        segment: ``[B, S]`` int64, the packed document of every token; ``None`` without packing.
        position_ids: ``[B, S]`` int64; read only with ``segment``.
    """

    position: Tensor | None
    length: int
    padding: Tensor | None
    segment: Tensor | None
    position_ids: Tensor

    def restrict(self, mask_function: MaskFunction) -> MaskFunction:
        """``mask_function`` over (batch, head, query, key) asked about the routed queries."""
        if self.segment is not None:
            mask_function = _within_segment(mask_function, self.segment, self.position_ids)
        if self.position is None:
            return mask_function
        position, inner = self.position, mask_function

        def routed(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return inner(batch, head, position[batch, query], key)

        return routed


def packed_segments(position_ids: Tensor) -> Tensor:
    """The document of every token of packed rows: a new one starts wherever positions do not go on by one.

    Args:
        position_ids: int64 ``[B, S]``.

    Returns:
        int64 ``[B, S]``, counting from 0 in every row.
    """
    previous = torch.cat([position_ids[:, :1] - 1, position_ids[:, :-1]], dim=1)
    return (position_ids - previous != 1).long().cumsum(1)


def _within_segment(mask_function: MaskFunction, segment: Tensor, position_ids: Tensor) -> MaskFunction:
    # Patterns in terms of distance or chunks hold inside a document, so they are asked about positions in it.
    def packed(batch: Any, head: Any, query: Any, key: Any) -> Any:
        same = segment[batch, query] == segment[batch, key]
        return same & mask_function(batch, head, position_ids[batch, query], position_ids[batch, key])

    return packed


@contextmanager
def routed_masks(visibility: Visibility) -> Iterator[None]:
    """Let the models' mask builders answer for the routed queries for the length of the block."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as builders

    local_before = dict(builders._local_mapping)
    try:
        for name, build in list(builders.items()):
            if not name.startswith("flash"):  # those take no mask; the passes do not run on them where one is needed
                builders[name] = _routed_builder(build, visibility)
        yield
    finally:
        builders._local_mapping.clear()
        builders._local_mapping.update(local_before)


def _routed_builder(build: Callable[..., Any], visibility: Visibility) -> Callable[..., Any]:
    def build_routed(*, mask_function: MaskFunction, **arguments: Any) -> Any:
        position = visibility.position
        arguments.update(
            q_length=visibility.length if position is None else position.shape[1],
            kv_length=visibility.length,
            q_offset=0,
            kv_offset=0,
            attention_mask=None if visibility.padding is None else visibility.padding.bool(),
            # Shortcuts to "plain causal" would read the padding on the host, and hold for consecutive queries only.
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
        )
        return build(mask_function=visibility.restrict(mask_function), **arguments)

    return build_routed
