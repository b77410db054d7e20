"""Selects the rows of a batch that take part in an update, and scatters their values back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cggr_core import SharedContext

# Arguments with one entry per row. Images and the like have no such layout, so their batches keep all rows.
_PER_ROW = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids"})


_OF_IMAGES = frozenset(
    {"pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "image_position_ids", "spatial_shapes"}
)


def check_no_images(inputs: Mapping[str, Any], gradient: str) -> None:
    """Raise if tokens would be processed separately from their images.

    Args:
        inputs: A batch.
        gradient: The gradient mode, not ``"exact"``.

    Raises:
        ValueError: Naming the inputs.
    """
    images = sorted(name for name in _OF_IMAGES & inputs.keys() if inputs[name] is not None)
    if images:
        raise ValueError(
            f"the batch holds {', '.join(images)}, but gradient={gradient!r} cannot run tokens without their images; "
            "use gradient='exact'"
        )


def rows_of(wanted: Tensor | None, countable: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
    """The rows to run, or None for all; reads one value from the device.

    Rows without a labelled token are dropped too. At least one row stays, so that every rank runs its passes, and the
    number of rows is rounded up so that shapes repeat.

    Args:
        wanted: bool ``[B]``; None for all.
        countable: bool ``[B, S]``.
        inputs: Arguments of the model's forward.

    Returns:
        int64 ``[b]``, ascending, or None.
    """
    size = countable.shape[0]
    if size == 1 or any(isinstance(value, Tensor) and name not in _PER_ROW for name, value in inputs.items()):
        return None
    taking_part = countable.any(1) if wanted is None else countable.any(1) & wanted
    count = int(taking_part.sum())
    step = max(1, size // 8)
    count = min(size, max(1, -(-count // step) * step))
    if count == size:
        return None
    # Participating rows come first, padded with others; then sorted again.
    return taking_part.to(torch.int8).argsort(descending=True, stable=True)[:count].sort().values


def take_rows(inputs: Mapping[str, Any], rows: Tensor | None, size: int) -> dict[str, Any]:
    """The arguments of a forward over those rows.

    Args:
        inputs: Arguments of a forward over all rows.
        rows: int64 ``[b]``, or None for all.
        size: Number of all rows B.
    """
    if rows is None:
        return dict(inputs)
    return {
        name: value.index_select(0, rows) if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
        for name, value in inputs.items()
    }


def shared_prompts(arguments: Mapping[str, Any], countable: Tensor) -> SharedContext | None:
    """The shared prompts of the rows, each stored once; None if that saves less than half.

    Prompts end where the batch's first label is predicted, so positions do not change.

    Args:
        arguments: Of a forward.
        countable: bool ``[B, S]``, the positions whose next token has a label.
    """
    if arguments.keys() - {"input_ids", "attention_mask"}:
        return None
    length = int(countable.any(0).to(torch.int8).argmax())
    if not length:
        return None
    ids, mask = arguments["input_ids"][:, :length], arguments.get("attention_mask")
    if mask is None:
        different, owners = ids.unique(dim=0, return_inverse=True)
    else:
        mask = mask[:, :length].to(ids.dtype)
        different, owners = torch.cat([ids * mask, mask], dim=1).unique(dim=0, return_inverse=True)
    if 2 * len(different) > len(ids):
        return None
    return SharedContext(different[:, :length], None if mask is None else different[:, length:], owners)


def without_needless_mask(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Drop an attention mask that masks nothing; reads one value from the device.

    Attention is faster for unpadded rows of one document. The mask stays if there are position ids, which transformers
    would otherwise search for packed documents.

    Args:
        arguments: Of a forward.
    """
    mask = arguments.get("attention_mask")
    if mask is None or arguments.get("position_ids") is not None or not bool(mask.all()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name != "attention_mask"}


def is_in(rows: Tensor | None, size: int, device: torch.device) -> Tensor:
    """Whether each row is one of ``rows``: bool ``[B]``."""
    if rows is None:
        return torch.ones(size, dtype=torch.bool, device=device)
    return torch.zeros(size, dtype=torch.bool, device=device).index_fill(0, rows, True)


def spread(values: Tensor, index: Tensor, valid: Tensor, rows: Tensor | None, below: Tensor) -> Tensor:
    """Scatter the values of some positions of some rows into a full tensor.

    Args:
        values: ``[b, K]``, may carry a graph.
        index: int64 ``[b, K]``, their positions.
        valid: bool ``[b, K]``; other slots are ignored.
        rows: int64 ``[b]``, their rows; None for all.
        below: ``[B, S]``, the values at all other positions.

    Returns:
        ``[B, S]``.
    """
    width = below.shape[1]
    # Invalid slots are written to an extra column, so that no position is written twice.
    padded = torch.nn.functional.pad(below if rows is None else below.index_select(0, rows), (0, 1))
    placed = padded.scatter(1, index.masked_fill(~valid, width), values.to(below.dtype))[:, :width]
    return placed if rows is None else below.index_copy(0, rows, placed)
