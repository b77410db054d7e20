"""The gradient pass: the kept tokens through the stock model with autograd.

Where a context pass has run a layer, its keys and values serve the other positions (two passes). Where it has not,
the layer's own call on the kept tokens pauses inside ``cache.update``, runs the same layer on the other tokens,
merges both sets of keys and values, and goes on (interleaved): no token is computed twice. One pass can do both,
recorded layers first, which is what a truncated router leaves.
"""

import contextvars
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cggr_core.routing.architectures import Architecture
from cggr_core.routing.attention import implementation
from cggr_core.routing.cache import EnoughError, OtherTokensCache, RoutedCache
from cggr_core.routing.context_pass import (
    Context,
    HeadReader,
    LayerOutput,
    head_read_by,
    ignore_head,
    layer_input,
    with_layer_input,
)
from cggr_core.routing.inputs import TokenInputs, other_positions
from cggr_core.routing.masks import routed_masks
from cggr_core.routing.ordering import shards_layers
from cggr_core.routing.patches import (
    attention_implementation,
    replaced_forwards,
    uses_checkpointing,
    without_checkpointing,
)
from cggr_core.routing.rows import stop_gradient
from cggr_core.routing.shared import KeyValue
from cggr_core.selection import Selection

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]


def gradient_pass(
    model: nn.Module,
    architecture: Architecture,
    inputs: TokenInputs,
    selection: Selection,
    context: Context,
    *,
    keep_graph: bool,
    read_head: HeadReader | None,
    layer_output: LayerOutput,
    note: dict[int, KeyValue] | None = None,
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
        layer_output: Wraps a hidden state the way the model's layers return it.
        note: Where to note the kept tokens' keys and values ``[B, H, K, D]`` of every layer, with their graph.

    Returns:
        What the model returned; its logits are the kept tokens' where the head was run.

    Raises:
        RuntimeError: If a layer did not use the cache.
    """
    index, length = selection.index, inputs.shape[1]
    attention = implementation(model, index.device.type)
    interleaved = context.depth < len(architecture.layers)
    others = None
    if interleaved and index.shape[1] < length:
        others = _OtherTokens(model, architecture, inputs, index, context, keep_graph, layer_output, attention)
    cache = RoutedCache(
        index=index,
        valid=selection.valid,
        length=length,
        recorded=context.recorded,
        other_index=None if others is None else others.index,
        others=None if others is None else others.run,
        keep_graph=keep_graph,
        in_turn=keep_graph and shards_layers(architecture.layers),
        shared=inputs.shared,
        note=note,
    )
    replacements: dict[nn.Module, Callable[..., Any]] = dict(architecture.norms)
    for number, layer in enumerate(architecture.layers):
        forward = layer.forward
        checkpointed = uses_checkpointing(layer)
        if checkpointed:
            # Inside the layer's hooks, as transformers does it.
            forward = partial(checkpoint, partial(_run_plainly, architecture, attention, forward), use_reentrant=False)
        if keep_graph and number >= context.depth:
            forward = partial(_run_with_fillers, forward, selection.valid)
        if checkpointed or keep_graph:
            replacements[layer] = forward
    with (
        without_checkpointing(architecture),
        attention_implementation(architecture, attention),
        routed_masks(inputs.visibility(index, key_gradient="all" if keep_graph else "kept")),
        replaced_forwards(replacements),
        head_read_by(architecture, read_head),
    ):
        output = model(**inputs.arguments(index), **{architecture.cache_name: cache}, use_cache=True)
    missing = sorted(set(range(len(architecture.layers))) - cache.updated)
    if missing:
        raise RuntimeError(f"layers {missing} did not pass their keys and values through the cache")
    return output


def _run_plainly(
    architecture: Architecture, attention: Callable[[str], str], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    # Recomputed during backward, when the changes around the pass have been undone.
    with (
        without_checkpointing(architecture),
        attention_implementation(architecture, attention),
        replaced_forwards(architecture.norms),
    ):
        return forward(*args, **kwargs)


def _run_with_fillers(forward: Callable[..., Any], valid: Tensor, *args: Any, **kwargs: Any) -> Any:
    # A slot that holds another token counts as one: gradients reach its keys and values, not what came before.
    hidden = layer_input(args, kwargs)
    args, kwargs = with_layer_input(args, kwargs, stop_gradient(hidden, passes=valid))
    return forward(*args, **kwargs)


class _OtherTokens:
    """The other tokens, one layer at a time, whenever the gradient pass asks for a layer's keys and values."""

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        inputs: TokenInputs,
        index: Tensor,
        context: Context,
        keep_graph: bool,
        layer_output: LayerOutput,
        attention: Callable[[str], str],
    ) -> None:
        self.index = other_positions(index, inputs.shape[1])
        self._keep_graph = keep_graph
        self._forwards = [layer.forward for layer in architecture.layers]
        self._cache = OtherTokensCache(
            index=self.index,
            kept_index=index,
            length=inputs.shape[1],
            keep_graph=keep_graph,
            last_layer=len(architecture.layers) - 1,
            shared=inputs.shared,
        )
        self._calls, hidden = self._layer_calls(model, architecture, inputs, layer_output, attention)
        if context.hidden is not None:
            rows = self.index[:, :, None].expand(-1, -1, context.hidden.shape[2])
            hidden = context.hidden.gather(1, rows)
        self._hidden = hidden

    @torch.no_grad()
    def _layer_calls(
        self,
        model: nn.Module,
        architecture: Architecture,
        inputs: TokenInputs,
        layer_output: LayerOutput,
        attention: Callable[[str], str],
    ) -> tuple[list[LayerCall], Tensor]:
        # Each layer's arguments (masks, rotary embeddings, biases) are taken from a call of the model in which the
        # layers hand their input on: they differ between layers of different kinds.
        calls: list[LayerCall] = []

        def note(*args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            return layer_output(layer_input(args, kwargs))

        replacements: dict[nn.Module, Callable[..., Any]] = dict(architecture.norms)
        replacements.update(dict.fromkeys(architecture.layers, note))
        with (
            without_checkpointing(architecture),
            attention_implementation(architecture, attention),
            routed_masks(inputs.visibility(self.index)),
            replaced_forwards(replacements),
            head_read_by(architecture, ignore_head),
        ):
            cache = {architecture.cache_name: self._cache}
            model(**inputs.arguments(self.index), **inputs.quiet, **cache, use_cache=True)
        return calls, layer_input(*calls[0])

    def run(self, layer: int, kept: KeyValue) -> tuple[KeyValue, KeyValue | None]:
        """Keys and values of the other tokens at ``layer``, computed at the first call, and all tokens' if made."""
        if layer not in self._cache.recorded:
            self._cache.kept = kept
            args, kwargs = with_layer_input(*self._calls[layer], self._hidden.detach())
            # The layer's forward, not the layer: this runs inside its call, hooks and gathered parameters included.
            # Its saved tensors are its own, not those of a checkpoint around the kept tokens' call.
            # And in a context of its own, so that transformers does not collect its outputs (an expert router's, say)
            # as those of the outer call.
            with torch.set_grad_enabled(self._keep_graph), _unhooked_saved_tensors(), suppress(EnoughError):
                output = contextvars.Context().run(self._forwards[layer], *args, **kwargs)
                self._hidden = (output[0] if isinstance(output, tuple) else output).detach()
            self._cache.kept = None
            merged, self._cache.merged = self._cache.merged, None
            self._calls[layer] = ((), {})  # frees the masks of layers that are done
            return self._cache.recorded[layer], merged
        # A checkpointed layer is being recomputed.
        return self._cache.recorded[layer], None


def _unhooked_saved_tensors() -> torch.autograd.graph.saved_tensors_hooks:
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
