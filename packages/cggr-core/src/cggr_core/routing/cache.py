"""Caches through which the passes read and replace every layer's keys and values.

A Hugging Face attention layer passes its keys and values (after rotary embedding) to ``cache.update`` and attends to
what it returns. Routing hooks into this call: a recording cache stores them, a routed cache returns full-length keys
and values with the kept rows replaced.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cggr_core.routing.ordering import backward_in_turn
from cggr_core.routing.remade import saved_tensors_are_hooked
from cggr_core.routing.rows import Places, merge_rows, replace_rows, stop_gradient
from cggr_core.routing.shared import KeyValue, RemadeForBackward, Shared

OptionalKeyValue = tuple[Tensor | None, Tensor | None]


def taken(recorded: dict[int, KeyValue], layer: int) -> KeyValue:
    """A layer's recorded keys and values, which are released if the layer will not run again.

    Otherwise they would still take memory when the loss is computed. A checkpointed layer runs again; while its first
    run is in progress, gradients are off or saved-tensor hooks are active.
    """
    comes_again = saved_tensors_are_hooked() or not torch.is_grad_enabled()
    return recorded[layer] if comes_again else recorded.pop(layer)


class PassCache(Cache):
    """A cache for one pass over ``queries`` of ``length`` positions; subclasses differ in ``update``.

    Args:
        queries: Tokens of the pass in each row.
        length: Positions of the batch's rows.
        shared: The shared tokens before them.
        places: Of :class:`~cggr_core.routing.architectures.Architecture`.

    Attributes:
        in_layers: Whether the model has finished its work on whole rows and is now in its layers.
    """

    is_compileable: Any = False  # a property of Cache

    def __init__(self, *, queries: int, length: int, shared: Shared | None, places: Mapping[int, int]) -> None:
        super().__init__(layers=[])
        self._places = places
        self._queries = queries
        self._shared = shared
        self._length = length if shared is None else shared.length + length
        self._before = self._length - length
        self.in_layers = False

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Number of positions before the queries, by the models' count."""
        if not self.in_layers or self._length - self._before == self._queries:
            return self._before
        if layer_idx is not None:
            raise RuntimeError(
                f"layer {layer_idx} derives positions from the number of cached tokens, which gives wrong positions "
                "for kept tokens"
            )
        # Layers with ALiBi add the number of queries to this to get the number of keys.
        return self._length - self._queries

    def get_mask_sizes(self, query_length: Any, layer_idx: int) -> tuple[int, int]:
        """Number of keys, and their offset."""
        return self._length, 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Queries are placed by the mask builders."""
        return 0

    def _whole(
        self, layer: int, own: KeyValue, *, constant: bool, in_turn: bool = False, made: KeyValue | None = None
    ) -> KeyValue:
        """Keys and values of all positions, shared ones included."""
        if self._shared is None:
            return own
        return self._shared.before(layer, own, constant=constant, in_turn=in_turn, made=made)


class RecordingCache(PassCache):
    """Records the keys and values of every layer in a pass over all positions.

    Args:
        length: Positions ``S``.
        keep_graph: Keep the graph of keys and values (gradient mode ``kv``); gradients are off after each ``update``
            either way, so that nothing else of the layer is kept.
        shared: The shared tokens before every row.
        places: As for :class:`PassCache`.
    """

    def __init__(self, *, length: int, keep_graph: bool, shared: Shared | None, places: Mapping[int, int]) -> None:
        super().__init__(queries=length, length=length, shared=shared, places=places)
        self.recorded: dict[int, KeyValue] = {}
        self._keep_graph = keep_graph

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> KeyValue:
        """Record a layer's keys and values, and attend to them as constants."""
        layer_idx = self._places.get(layer_idx, layer_idx)
        constant = key_states.detach(), value_states.detach()
        self.recorded[layer_idx] = (key_states, value_states) if self._keep_graph else constant
        torch.set_grad_enabled(False)
        return self._whole(layer_idx, constant, constant=True)


class LastLayerReachedError(Exception):
    """Ends a layer's call on the other tokens if only its keys and values are needed."""


class OtherTokensCache(PassCache):
    """Keys and values of the other tokens, merged for their own attention with the kept tokens' (as constants).

    Args:
        index: Positions of the other tokens, ``[B, M]``.
        kept_index: Kept positions, ``[B, K]``.
        length: Positions ``S = M + K``.
        keep_graph: Keep the graph of keys and values (gradient mode ``kv``).
        last_layer: Layer whose output for the other tokens is unused; ``update`` raises :class:`LastLayerReachedError`
            there.
        shared: The shared tokens before every row.
        places: As for :class:`PassCache`.
    """

    def __init__(
        self,
        *,
        index: Tensor,
        kept_index: Tensor,
        length: int,
        keep_graph: bool,
        last_layer: int,
        shared: Shared | None,
        places: Mapping[int, int],
    ) -> None:
        super().__init__(queries=index.shape[1], length=length, shared=shared, places=places)
        self.in_layers = True
        self._last_layer = last_layer
        self._others = Places(index, length)
        self._keeps = Places(kept_index, length)
        self._keep_graph = keep_graph
        self.recorded: dict[int, KeyValue] = {}
        self.kept: KeyValue | None = None
        self.merged: KeyValue | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> KeyValue:
        """Record the other tokens' keys and values, and let them attend to all positions."""
        layer_idx = self._places.get(layer_idx, layer_idx)
        constant = key_states.detach(), value_states.detach()
        self.recorded[layer_idx] = (key_states, value_states) if self._keep_graph else constant
        torch.set_grad_enabled(False)
        if layer_idx == self._last_layer:
            raise LastLayerReachedError
        if self.kept is None:
            raise RuntimeError(f"layer {layer_idx} ran on the other tokens before the kept ones")
        keys, values = (
            merge_rows(other, kept, others=self._others, keeps=self._keeps)
            for other, kept in zip(constant, self.kept, strict=True)
        )
        self.merged = self._whole(layer_idx, (keys, values), constant=True)
        return self.merged


class RoutedCache(PassCache):
    """Full-length keys and values for the gradient pass.

    Args:
        index: Kept positions, ``[B, K]``.
        valid: ``[B, K]``; where false, the slot is filled with another token.
        length: Positions ``S``.
        recorded: Full-length keys and values of the layers that a context pass has run; each layer removes its own.
        other_index: Positions of the other tokens, ``[B, S - K]``; ``None`` if every layer was recorded.
        others: For layers that were not recorded, maps ``(layer, kept key and value)`` to the other tokens' key and
            value, and to the merged ones if they exist already; ``None`` if all layers were recorded or there are no
            other tokens.
        keep_graph: Whether keys and values of other tokens carry gradients (mode ``kv``).
        in_turn: Whether the backward pass of recorded keys and values runs inside the layer's own.
        shared: The shared tokens before every row.
        places: As for :class:`PassCache`.
        note: Where to note the kept tokens' own keys and values, or ``None``.
    """

    def __init__(
        self,
        *,
        index: Tensor,
        valid: Tensor,
        length: int,
        recorded: dict[int, KeyValue],
        other_index: Tensor | None,
        others: Callable[[int, KeyValue], tuple[KeyValue, KeyValue | None]] | None,
        keep_graph: bool,
        in_turn: bool,
        shared: Shared | None,
        places: Mapping[int, int],
        note: dict[int, KeyValue] | None,
    ) -> None:
        super().__init__(queries=index.shape[1], length=length, shared=shared, places=places)
        self._note = note
        self.remade = RemadeForBackward()
        self._in_turn = in_turn
        self._replacing = Places(index, length, valid)
        # In mode "detached", a filler slot is a constant to the kept tokens, like any other token. In mode "kv" its
        # keys and values take gradients, and its hidden state is stopped where the layer begins.
        self._merging = Places(index, length, None if keep_graph else valid)
        self._other_places = None if other_index is None else Places(other_index, length)
        self._recorded = recorded
        self._recorded_layers = frozenset(recorded)
        self._others = others
        self.updated: set[int] = set()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> KeyValue:
        """Keys and values of all positions, the kept rows fresh."""
        # Called again with the same keys and values when a checkpointed layer is recomputed: nothing here may depend on
        # how often, and the other tokens' keys and values come from memory.
        layer_idx = self._places.get(layer_idx, layer_idx)
        self.updated.add(layer_idx)
        fresh = key_states, value_states
        if self._note is not None:
            self._note.setdefault(layer_idx, fresh)
        own, made = self._own(layer_idx, fresh)
        whole = self._whole(layer_idx, own, constant=False, in_turn=self._in_turn, made=made)
        if self._shared is not None:
            self.remade.watch(whole, partial(self._again, layer_idx, (key_states.detach(), value_states.detach())))
        return whole

    def _again(self, layer_idx: int, fresh: KeyValue) -> KeyValue:
        return self._whole(layer_idx, self._own(layer_idx, fresh)[0], constant=True)

    def _own(self, layer_idx: int, fresh: KeyValue) -> tuple[KeyValue, KeyValue | None]:
        """Keys and values of the rows' own positions, and of all positions if they are already merged."""
        if layer_idx in self._recorded_layers:
            recorded = taken(self._recorded, layer_idx)
            if self._in_turn:
                recorded = backward_in_turn(recorded, before=fresh[0])
            keys, values = (
                replace_rows(full, kept, keeps=self._replacing) for full, kept in zip(recorded, fresh, strict=True)
            )
            return (keys, values), None
        if self._others is None or self._other_places is None:
            return self._all_fresh(fresh), None
        others, made = self._others(layer_idx, (fresh[0].detach(), fresh[1].detach()))
        merged: OptionalKeyValue = (None, None)
        if made is not None:
            before = 0 if self._shared is None else self._shared.length
            merged = made[0][:, :, before:], made[1][:, :, before:]
        keys, values = (
            merge_rows(other, kept, others=self._other_places, keeps=self._merging, merged=whole)
            for other, kept, whole in zip(others, fresh, merged, strict=True)
        )
        return (keys, values), made

    def _all_fresh(self, fresh: KeyValue) -> KeyValue:
        """Keys and values where every position is in the pass, in order."""
        valid = self._merging.valid
        if valid is None:
            return fresh
        keys, values = (stop_gradient(part.transpose(1, 2), passes=valid).transpose(1, 2) for part in fresh)
        return keys, values
