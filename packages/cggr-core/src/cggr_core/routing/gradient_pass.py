"""The gradient pass: the kept tokens through the stock model with autograd.

Where a context pass has run a layer, its keys and values serve the other positions (two passes). Where it has not,
the layer's own call on the kept tokens pauses inside ``cache.update``, runs the same layer on the other tokens,
merges both sets of keys and values, and goes on (interleaved): no token is computed twice. One pass can do both,
recorded layers first, which is what a truncated router leaves.
"""

import contextvars
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cggr_core.routing.adapters import InvokedAdapters
from cggr_core.routing.architectures import Architecture
from cggr_core.routing.attention import implementation
from cggr_core.routing.cache import EnoughError, OtherTokensCache, RoutedCache
from cggr_core.routing.context_pass import (
    Context,
    HeadReader,
    head_read_by,
    layer_input,
)
from cggr_core.routing.inputs import TokenInputs, other_positions
from cggr_core.routing.layer_rows import LayerCall, LayerRows
from cggr_core.routing.masks import routed_masks
from cggr_core.routing.patches import (
    attention_implementation,
    replaced_forwards,
    uses_checkpointing,
    without_checkpoint_wrappers,
    without_checkpointing,
)
from cggr_core.routing.rows import stop_gradient
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
) -> Any:
    """Run the kept tokens through all layers with gradients.

    Args:
        model: The model.
        architecture: Its description.
        inputs: The whole batch.
        selection: The kept tokens, one row of the selection for each row of the batch.
        context: What a context pass of any depth left; depth 0 stands for none.
        keep_graph: Mode ``kv``: keys and values of other tokens carry gradients to their projections.
        read_head: Called with the head's input ``[B, K, H]``, which carries the graph, in place of the head;
            ``None`` runs the model's own head.
        note: Where to note the kept tokens' keys and values ``[B, H, K, D]`` of every layer, with their graph.
        precision: From a layer's number to a block in which that layer computes other tokens in another precision than
            its own.

    Returns:
        What the model returned; its logits are the kept tokens' where the head was run.

    Raises:
        RuntimeError: If a layer did not use the cache.
    """
    index, length = selection.index, inputs.shape[1]
    attention = implementation(model, index.device.type)
    interleaved = context.depth < len(architecture.layers)
    adapters = InvokedAdapters(model, length)
    others = (
        _OtherTokens(architecture, inputs, index, context, keep_graph, adapters, precision) if interleaved else None
    )
    cache = RoutedCache(
        index=index,
        valid=selection.valid,
        length=length,
        recorded=context.recorded,
        other_index=None if others is None or not others.exist else others.index,
        others=None if others is None or not others.exist else others.run,
        keep_graph=keep_graph,
        in_turn=keep_graph and shards_layers(architecture.layers),
        shared=inputs.shared,
        note=note,
    )
    spreads = architecture.whole_after_layers
    beyond_kept = keep_graph or (inputs.shared is not None and inputs.shared.takes_gradients)
    rows = LayerRows(index, length, key_gradient="all" if beyond_kept else "kept")

    def run(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        cache.in_layers = True
        whole = hidden = layer_input(args, kwargs)
        if number == 0:
            hidden = rows.hidden(whole)
        if others is not None and number >= context.depth:
            others.note(number, whole, args, kwargs, cache)
            if keep_graph:
                # A slot that holds another token counts as one: gradients reach its keys and values, not what came
                # before.
                hidden = stop_gradient(hidden, passes=selection.valid)
        args, kwargs = rows.call(args, kwargs, replace={id(whole): hidden})
        with adapters.at(index):
            output = forward(*args, **kwargs)
        if spreads and number == len(architecture.layers) - 1:
            return (rows.spread(output[0]), *output[1:]) if isinstance(output, tuple) else rows.spread(output)
        return output

    def at_kept(forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(rows.hidden(hidden), *args, **kwargs)

    def run_plainly(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Recomputed during backward, when the changes around the pass have been undone.
        with (
            without_checkpointing(architecture),
            attention_implementation(architecture, attention),
            replaced_forwards(architecture.fused),
            adapters.at(index),
        ):
            return forward(*args, **kwargs)

    def read_kept(hidden: Tensor) -> None:
        if read_head is not None:
            read_head(rows.hidden(hidden))

    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        return partial(checkpoint, partial(run_plainly, forward), use_reentrant=False)

    replacements: dict[nn.Module, Callable[..., Any]] = dict(architecture.fused)
    for wrapper, wrapped in architecture.checkpoint_wrappers.items():
        replacements[wrapper] = recomputed(wrapped)
    for number, layer in enumerate(architecture.layers):
        forward = replacements.get(layer, layer.forward)
        if uses_checkpointing(layer):
            # Inside the layer's hooks, as transformers does it.
            forward = recomputed(forward)
        replacements[layer] = partial(run, number, forward)
    if spreads and read_head is None:
        replacements[architecture.head.module] = partial(at_kept, architecture.head.module.forward)
    with (
        without_checkpointing(architecture),
        attention_implementation(architecture, attention),
        routed_masks(inputs.visibility(), taken_apart=True),
        replaced_forwards(replacements),
        head_read_by(architecture, read_kept if spreads and read_head is not None else read_head),
        nullcontext() if inputs.shared is None else cache.remade.saving(),
    ):
        output = model(**inputs.arguments(), **{architecture.cache_name: cache}, use_cache=True)
    missing = sorted(set(range(len(architecture.layers))) - cache.updated)
    if missing:
        raise RuntimeError(f"layers {missing} did not pass their keys and values through the cache")
    return output


class _OtherTokens:
    """The other tokens, one layer at a time, whenever the gradient pass asks for a layer's keys and values."""

    def __init__(
        self,
        architecture: Architecture,
        inputs: TokenInputs,
        index: Tensor,
        context: Context,
        keep_graph: bool,
        adapters: InvokedAdapters,
        precision: Callable[[int], AbstractContextManager[None]] | None,
    ) -> None:
        length = inputs.shape[1]
        self.exist = index.shape[1] < length
        self.index = other_positions(index, length)
        self._keep_graph = keep_graph
        self._adapters = adapters
        self._precision = precision
        self._architecture = architecture
        self._forwards = [architecture.checkpoint_wrappers.get(layer, layer.forward) for layer in architecture.layers]
        self._cache = OtherTokensCache(
            index=self.index,
            kept_index=index,
            length=length,
            keep_graph=keep_graph,
            last_layer=len(architecture.layers) - 1,
            shared=inputs.shared,
        )
        self._rows = LayerRows(self.index, length)
        self._calls: dict[int, tuple[int, Any, LayerCall]] = {}
        self._hidden = context.hidden if context.hidden is None else self._rows.hidden(context.hidden)

    def note(self, layer: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any) -> None:
        """What a layer is about to be given for whole rows; its hidden states are the other tokens' at first only."""
        if not self.exist:
            return
        if self._hidden is None:
            self._hidden = self._rows.hidden(hidden.detach())
        self._calls[layer] = id(hidden), cache, (args, kwargs)

    def run(self, layer: int, kept: KeyValue) -> tuple[KeyValue, KeyValue | None]:
        """Keys and values of the other tokens at ``layer``, computed at the first call, and all tokens' if made."""
        if layer not in self._cache.recorded:
            self._cache.kept = kept
            hidden, cache, (args, kwargs) = self._calls.pop(layer)  # frees the masks of layers that are done
            assert self._hidden is not None  # noted before the first layer
            args, kwargs = self._rows.call(
                args, kwargs, replace={hidden: self._hidden.detach(), id(cache): self._cache}
            )
            # The layer's forward, not the layer: this runs inside its call, hooks and gathered parameters included.
            # Its saved tensors are its own, not those of a checkpoint around the kept tokens' call.
            # And in a context of its own, so that transformers does not collect its outputs (an expert router's, say)
            # as those of the outer call.
            with (
                torch.set_grad_enabled(self._keep_graph),
                _unhooked_saved_tensors(),
                self._adapters.at(self.index),
                without_checkpoint_wrappers(self._architecture),
                nullcontext() if self._precision is None else self._precision(layer),
                suppress(EnoughError),
            ):
                output = contextvars.Context().run(self._forwards[layer], *args, **kwargs)
                self._hidden = (output[0] if isinstance(output, tuple) else output).detach()
            self._cache.kept = None
            merged, self._cache.merged = self._cache.merged, None
            return self._cache.recorded[layer], merged
        # A checkpointed layer is being recomputed.
        return self._cache.recorded[layer], None


def _unhooked_saved_tensors() -> torch.autograd.graph.saved_tensors_hooks:
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
