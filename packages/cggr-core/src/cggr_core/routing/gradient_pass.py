"""The gradient pass: the kept tokens through the stock model with autograd.

If a context pass has run a layer, its keys and values are used for the other positions (two passes). If not, the
layer's call on the kept tokens pauses inside ``cache.update``, runs the same layer on the other tokens, merges both
sets of keys and values, and continues (interleaved): no token is computed twice. One pass can combine both, recorded
layers first, as after a truncated router.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cggr_core.routing.adapters import InvokedAdapters
from cggr_core.routing.architectures import Architecture
from cggr_core.routing.attention import implementation
from cggr_core.routing.cache import RoutedCache
from cggr_core.routing.context_pass import (
    Context,
    HeadReader,
    gives_layers_the_cache,
    head_read_by,
    layer_input,
    with_cache,
)
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.layer_rows import LayerRows
from cggr_core.routing.masks import routed_masks
from cggr_core.routing.other_tokens import OtherTokens
from cggr_core.routing.patches import (
    attention_implementation,
    replaced_forwards,
    uses_checkpointing,
    without_checkpointing,
)
from cggr_core.routing.rows import Places, stop_gradient
from cggr_core.routing.sharding import shards_layers
from cggr_core.routing.shared import KeyValue
from cggr_core.selection import Selection


def gradient_pass(
    model: nn.Module,
    architecture: Architecture,
    inputs: TokenInputs,
    selection: Selection,
    context: Context,
    *,
    keep_graph: bool,
    read_head: HeadReader | None,
    note: dict[int, KeyValue] | None = None,
    precision: Callable[[int], AbstractContextManager[None]] | None = None,
    preserve_rng_state: bool = True,
) -> Any:
    """Run the kept tokens through all layers with gradients.

    Args:
        model: The model.
        architecture: Its description.
        inputs: The whole batch.
        selection: The kept tokens, one row of the selection for each row of the batch.
        context: Results of a context pass of any depth; depth 0 means none. Its keys, values and outputs are moved
            out, so it can be used for one gradient pass only.
        keep_graph: Mode ``kv``: keys and values of other tokens carry gradients to their projections.
        read_head: Called with the head's input ``[B, K, H]``, which carries the graph, in place of the head;
            ``None`` runs the model's own head.
        note: Where to record the kept tokens' keys and values ``[B, H, K, D]`` of every layer, with their graph.
        precision: Maps a layer's number to a context in which that layer computes other tokens in a lower precision;
            ``None`` for its own.
        preserve_rng_state: Whether checkpointed layers are recomputed under the random state of their forward; needed
            if there is dropout.

    Returns:
        What the model returned; its logits are the kept tokens' if the head was run.

    Raises:
        RuntimeError: If a layer did not use the cache.
    """
    index, length = selection.index, inputs.shape[1]
    at_layers = gives_layers_the_cache(architecture, inputs)
    attention = implementation(model, index.device.type)
    adapters = InvokedAdapters(model, length)
    others = None
    if context.depth < len(architecture.layers):
        others = OtherTokens(architecture, inputs, index, context, keep_graph, adapters, precision)
    running = others if others is not None and others.exist else None
    cache = RoutedCache(
        index=index,
        valid=selection.valid,
        length=length,
        recorded=context.recorded,
        other_index=None if running is None else running.index,
        others=None if running is None else running.run,
        keep_graph=keep_graph,
        in_turn=keep_graph and shards_layers(architecture.layers),
        shared=inputs.shared,
        places=architecture.places,
        note=note,
    )
    kept = _KeptTokens(
        architecture,
        inputs,
        selection,
        cache,
        adapters,
        attention,
        keep_graph=keep_graph,
        preserve_rng_state=preserve_rng_state,
    )
    # Read which layers are recomputed before their switch is turned off.
    forwards = kept.forwards(others, recorded=context.depth)
    if context.outputs is not None:
        forwards |= context.outputs.reusing(Places(index, length))
    with (
        without_checkpointing(architecture),
        attention_implementation(architecture, attention),
        routed_masks(
            inputs.visibility(),
            architecture=architecture,
            own_documents=at_layers,
            taken_apart=True,
        ),
        replaced_forwards(forwards),
        head_read_by(architecture, None if read_head is None else kept.reader(read_head)),
        nullcontext() if inputs.shared is None else cache.remade.saving(),
    ):
        arguments = inputs.arguments()
        arguments |= {"use_cache": False} if at_layers else {architecture.cache_name: cache, "use_cache": True}
        output = model(**arguments)
    missing = sorted(set(range(len(architecture.layers))) - cache.updated)
    if missing:
        raise RuntimeError(f"layers {missing} did not pass their keys and values through the cache")
    return output


class _KeptTokens:
    """The kept tokens' side of a pass: the forwards that replace the model's."""

    def __init__(
        self,
        architecture: Architecture,
        inputs: TokenInputs,
        selection: Selection,
        cache: RoutedCache,
        adapters: InvokedAdapters,
        attention: Callable[[str], str],
        *,
        keep_graph: bool,
        preserve_rng_state: bool,
    ) -> None:
        self._architecture = architecture
        self._selection = selection
        self._cache = cache
        self._adapters = adapters
        self._attention = attention
        self._keep_graph = keep_graph
        self._preserve_rng_state = preserve_rng_state
        self._at_layers = gives_layers_the_cache(architecture, inputs)
        beyond_kept = keep_graph or (inputs.shared is not None and inputs.shared.takes_gradients)
        key_gradient = "all" if beyond_kept else "kept"
        self._rows = LayerRows(selection.index, inputs.shape[1], key_gradient=key_gradient)

    def forwards(self, others: OtherTokens | None, *, recorded: int) -> dict[nn.Module, Callable[..., Any]]:
        """Forwards for every layer, its fused and checkpointed modules, and a head that receives whole rows.

        Args:
            others: The other tokens, for layers that were not recorded.
            recorded: Layers that a context pass has run.
        """
        architecture = self._architecture
        forwards: dict[nn.Module, Callable[..., Any]] = dict(architecture.fused)
        for wrapper, wrapped in architecture.checkpoint_wrappers.items():
            forwards[wrapper] = self._checkpointed(wrapped)
        for number, layer in enumerate(architecture.layers):
            forward = forwards.get(layer, layer.forward)
            if uses_checkpointing(layer):
                # Inside the layer's hooks, as in transformers.
                forward = self._checkpointed(forward)
            forwards[layer] = partial(self._layer, number, forward, others if number >= recorded else None)
        if architecture.whole_after_layers:
            head = architecture.head.module
            forwards[head] = partial(self._head, head.forward)
        return forwards

    def reader(self, read_head: HeadReader) -> HeadReader:
        """``read_head``, applied to the kept positions of the head's input."""
        if not self._architecture.whole_after_layers:
            return read_head
        return lambda hidden: read_head(self._rows.hidden(hidden))

    def _layer(
        self, number: int, forward: Callable[..., Any], others: OtherTokens | None, *args: Any, **kwargs: Any
    ) -> Any:
        self._cache.in_layers = True
        if self._at_layers:
            args, kwargs = with_cache(self._architecture.layers[number], args, kwargs, self._cache)
        whole = hidden = layer_input(args, kwargs)
        if number == 0:
            hidden = self._rows.hidden(whole)
        if others is not None:
            others.note(number, whole, args, kwargs, self._cache)
            if self._keep_graph:
                # A filler slot is treated as the other token it holds: gradients reach its keys and values, but nothing
                # before them.
                hidden = stop_gradient(hidden, passes=self._selection.valid)
        args, kwargs = self._rows.call(args, kwargs, replace={id(whole): hidden})
        with self._adapters.at(self._selection.index):
            output = forward(*args, **kwargs)
        if self._architecture.whole_after_layers and number == len(self._architecture.layers) - 1:
            spread = self._rows.spread
            return (spread(output[0]), *output[1:]) if isinstance(output, tuple) else spread(output)
        return output

    def _head(self, forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self._rows.hidden(hidden), *args, **kwargs)

    def _checkpointed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        recomputable = partial(self._recomputable, forward)
        return partial(checkpoint, recomputable, use_reentrant=False, preserve_rng_state=self._preserve_rng_state)

    def _recomputable(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Runs again during backward, when the changes around the pass have been undone.
        with (
            without_checkpointing(self._architecture),
            attention_implementation(self._architecture, self._attention),
            replaced_forwards(self._architecture.fused),
            self._adapters.at(self._selection.index),
        ):
            return forward(*args, **kwargs)
