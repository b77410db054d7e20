"""Slices a decoder layer's arguments, built by the model for whole rows, to some of the positions.

In a pass over some of the tokens, the model itself still sees whole rows: it builds embeddings, positions, rotary
frequencies, masks and whatever depends on a row's length, on later tokens or on token types as in any forward. Only
what it passes to its layers is sliced here.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from cggr_core.routing.masks import RowMask
from cggr_core.routing.rows import Places

_AS_THEY_ARE = (bool, int, float, str)
_TAKEN_APART = (Tensor, RowMask)

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]


def _forget(rows: "weakref.ref[LayerRows]", key: int) -> None:
    alive = rows()
    if alive is not None:
        alive._taken.pop(key, None)


class LayerRows:
    """Slices a layer's arguments to some positions.

    Args:
        index: Distinct positions, int64 ``[B, Q]``.
        length: Positions ``S`` of a row.
        key_gradient: ``"all"``, or ``"kept"`` if keys and values need gradients at ``index`` only.
    """

    def __init__(self, index: Tensor, length: int, *, key_gradient: str = "all") -> None:
        self.index = index
        self._places = Places(index, length)
        self._length = length
        self._key_gradient = key_gradient
        # Layers share most of their arguments, so each is sliced once: cached by id, for as long as the argument lives.
        self._taken: dict[int, tuple[weakref.ref[Any], Any]] = {}

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, replace: dict[int, Any]) -> LayerCall:
        """A layer's arguments, sliced to the positions.

        Args:
            args: Positional arguments of the layer, starting with the hidden state unless that is in ``kwargs``.
            kwargs: Keyword arguments of the layer.
            replace: Maps the ``id`` of an argument to its replacement (the hidden state, a cache).
        """
        first = tuple(replace[id(value)] if id(value) in replace else self._take("", value) for value in args)
        named = {
            name: replace[id(value)] if id(value) in replace else self._take(name, value)
            for name, value in kwargs.items()
        }
        return first, named

    def hidden(self, hidden: Tensor) -> Tensor:
        """Whole rows of hidden states, sliced to the positions, with their graph."""
        taken = self._rows_of("hidden_states", hidden)
        if taken is None:
            raise ValueError(f"hidden states {list(hidden.shape)} have no dimension for the {self._length} tokens")
        return taken

    def spread(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[B, Q, ...]`` of the positions as whole rows with 0 elsewhere, with their graph."""
        batch, slots = self.index.shape
        if slots == self._length:
            return hidden
        whole = hidden.new_zeros(batch * self._length, *hidden.shape[2:])
        return whole.index_copy(0, self._places.flat, hidden.flatten(0, 1)).view(batch, self._length, *hidden.shape[2:])

    def _take(self, name: str, value: Any) -> Any:
        # Called for every argument of every layer, so the most frequent kinds come first.
        if value is None or isinstance(value, _AS_THEY_ARE):
            return value
        if isinstance(value, _TAKEN_APART):
            key, known = id(value), self._taken
            if key not in known:
                # Not a cycle, which would hold the tensors until Python looks for cycles.
                rows: weakref.ref[LayerRows] = weakref.ref(self)
                known[key] = weakref.ref(value, lambda _: _forget(rows, key)), self._taken_from(name, value)
            return known[key][1]
        if isinstance(value, dict):
            return {key: self._take(name, part) for key, part in value.items()}
        if type(value) in (tuple, list):
            return type(value)([self._take(name, part) for part in value])
        return value

    def _taken_from(self, name: str, value: Tensor | RowMask) -> Any:
        if isinstance(value, RowMask):
            return value.at(self.index, key_gradient=self._key_gradient)
        taken = self._rows_of(name, value)
        return value if taken is None else taken

    def _rows_of(self, name: str, value: Tensor) -> Tensor | None:
        """The part of a tensor that belongs to the positions; ``None`` if it is not per token."""
        batch, slots = self.index.shape
        shape, is_mask = value.shape, "mask" in name
        if value.dim() < 2 or (value.dim() == 2 and is_mask):  # a mask of two dimensions marks padded keys
            return None
        if slots == self._length:
            return value  # every position, in order
        if shape[1] == self._length and shape[0] in (1, batch) and not is_mask:
            return self._take_rows(value)
        if value.dim() < 3 or shape[2] != self._length or (value.dim() == 3 and value.is_floating_point()):
            return None
        if not is_mask and shape[1] in (1, batch) and (shape[1] == batch or shape[0] not in (1, batch)):
            # Several kinds of position (``[3, B, S, D]``), or streams of hidden states.
            if shape[0] == batch > 1 and not _is_of_tokens(name):
                raise ValueError(
                    f"a layer's argument {name or 'without a name'} has shape {list(shape)}, and either of its first "
                    f"two dimensions could be the batch of {batch} rows; use a different number of rows"
                )
            return torch.stack([self._take_rows(part) for part in value])
        if shape[0] in (1, batch):  # with a dimension for heads
            return self._take_rows(value.transpose(1, 2)).transpose(1, 2)
        return None

    def _take_rows(self, value: Tensor) -> Tensor:
        batch, slots = self.index.shape
        rows = value.expand(batch, *value.shape[1:]).reshape(batch * self._length, -1)
        return rows.index_select(0, self._places.flat).view(batch, slots, *value.shape[2:])


def _is_of_tokens(name: str) -> bool:
    """Whether an argument of this name has no dimension for heads."""
    return name in ("hidden_states", "rotary_pos_emb", "cos", "sin") or ("position" in name and "bias" not in name)
