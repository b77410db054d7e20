"""The other tokens of an interleaved pass: run layer by layer, inside the kept tokens' own call of each layer."""

import contextvars
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.routing.adapters import InvokedAdapters
from cggr_core.routing.architectures import Architecture
from cggr_core.routing.cache import LastLayerReachedError, OtherTokensCache, taken
from cggr_core.routing.context_pass import Context
from cggr_core.routing.hooks import has_hooks, is_of_distributed
from cggr_core.routing.inputs import TokenInputs, other_positions
from cggr_core.routing.layer_rows import LayerCall, LayerRows
from cggr_core.routing.patches import without_checkpoint_wrappers
from cggr_core.routing.remade import remade_norms
from cggr_core.routing.shared import KeyValue


class OtherTokens:
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
        self._hooked = {number: layer for number, layer in enumerate(architecture.layers) if has_hooks(layer)}
        self._cache = OtherTokensCache(
            index=self.index,
            kept_index=index,
            length=length,
            keep_graph=keep_graph,
            last_layer=len(architecture.layers) - 1,
            shared=inputs.shared,
            places=architecture.places,
        )
        self._rows = LayerRows(self.index, length)
        self._ran = False
        self._calls: dict[int, tuple[int, Any, LayerCall]] = {}
        self._hidden = context.hidden if context.hidden is None else self._rows.hidden(context.hidden)

    def note(self, layer: int, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any) -> None:
        """Note a layer's arguments for whole rows; only the first layer's hidden states are the other tokens'."""
        if not self.exist:
            return
        if self._hidden is None:
            self._hidden = self._rows.hidden(hidden)
        self._calls[layer] = id(hidden), cache, (args, kwargs)

    def run(self, layer: int, kept: KeyValue) -> tuple[KeyValue, KeyValue | None]:
        """The other tokens' keys and values at ``layer``, computed once; and all tokens', if they exist."""
        if layer not in self._cache.recorded:
            self._cache.kept = kept
            hidden, cache, (args, kwargs) = self._calls.pop(layer)  # frees the masks of finished layers
            assert self._hidden is not None  # noted before the first layer
            args, kwargs = self._rows.call(
                args, kwargs, replace={hidden: self._hidden.detach(), id(cache): self._cache}
            )
            hooked = self._hooked.get(layer)
            if hooked is not None and self._ran:  # otherwise the hooks have run around what was noted
                args, kwargs = _before(hooked, args, kwargs)
            # The layer's forward, not the layer: this runs inside its call, while its parameters are gathered. It keeps
            # its own saved tensors, outside a checkpoint around the kept tokens' call, and runs in its own context, so
            # that transformers does not collect its outputs (an expert router's, say) as those of the outer call.
            with (
                torch.set_grad_enabled(self._keep_graph),
                self._adapters.at(self.index),
                without_checkpoint_wrappers(self._architecture),
                nullcontext() if self._precision is None else self._precision(layer),
                remade_norms(self._architecture, layer) if self._keep_graph else nullcontext(),
                suppress(LastLayerReachedError),
            ):
                output = contextvars.Context().run(self._forwards[layer], *args, **kwargs)
                if hooked is not None:
                    output = _after(hooked, args, kwargs, output)
                self._hidden = output[0] if isinstance(output, tuple) else output
            self._ran = True
            self._cache.kept = None
            merged, self._cache.merged = self._cache.merged, None
            return taken(self._cache.recorded, layer), merged
        # A checkpointed layer is being recomputed.
        return self._cache.recorded[layer], None


@torch.no_grad()
def _before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
    """A layer's arguments after users' hooks, as constants; torch's own hooks gather weights in its outer call."""
    for number, hook in layer._forward_pre_hooks.items():
        if is_of_distributed(hook):
            continue
        if number in layer._forward_pre_hooks_with_kwargs:
            args, kwargs = hook(layer, args, kwargs) or (args, kwargs)
        elif (changed := hook(layer, args)) is not None:
            args = changed if isinstance(changed, tuple) else (changed,)
    return args, kwargs


def _after(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """A layer's output after users' hooks."""
    for number, hook in layer._forward_hooks.items():
        if is_of_distributed(hook):
            continue
        given = (args, kwargs) if number in layer._forward_hooks_with_kwargs else (args,)
        changed = hook(layer, *given, output)
        output = output if changed is None else changed
    return output
