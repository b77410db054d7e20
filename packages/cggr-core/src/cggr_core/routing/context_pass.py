"""The context pass: runs all tokens through the first layers and records keys, values and the head's input."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.routing.architectures import CACHE_NAMES, Architecture
from cggr_core.routing.attention import implementation
from cggr_core.routing.cache import RecordingCache
from cggr_core.routing.hooks import has_hooks
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.masks import routed_masks, whole_rows
from cggr_core.routing.outputs import PassOutputs
from cggr_core.routing.patches import (
    attention_implementation,
    replaced_forwards,
    without_checkpointing,
    without_hooks,
)
from cggr_core.routing.remade import remade_norms, saved_tensors_are_hooked
from cggr_core.routing.shared import KeyValue


@dataclass(frozen=True)
class Context:
    """Results of a context pass.

    Attributes:
        recorded: Full-length keys and values of the layers below ``depth``, until a gradient pass takes them.
        hidden: Input of layer ``depth`` at every position ``[B, S, H]``; ``None`` at full depth.
        depth: Layers that were run.
        logits: ``[B, S, V]`` where the model's own head was run, else ``None``.
        outputs: Outputs of its linear layers, if a gradient pass is to reuse them.
    """

    recorded: dict[int, KeyValue]
    hidden: Tensor | None
    depth: int
    logits: Tensor | None = None
    outputs: PassOutputs | None = None


NO_CONTEXT = Context({}, None, 0)


HeadReader = Callable[[Tensor], None]
LayerOutput = Callable[[Tensor], Any]


@torch.no_grad()
def context_pass(
    model: nn.Module,
    architecture: Architecture,
    inputs: TokenInputs,
    *,
    depth: int,
    keep_graph: bool,
    read_head: HeadReader | None,
    layer_output: LayerOutput,
    precision: AbstractContextManager[None] | None = None,
    outputs: PassOutputs | None = None,
) -> Context:
    """Run all tokens through the first ``depth`` layers without keeping activations.

    Layers above ``depth`` return hidden states unchanged, so the model itself applies its final norm and anything else
    before its head.

    Args:
        model: The model.
        architecture: Its description.
        inputs: The batch.
        depth: Layers to run, up to all.
        keep_graph: Keep the graph from each layer's (detached) input to its keys and values, for mode ``kv``.
        read_head: Called with the head's input ``[B, S, H]`` in place of the head; ``None`` runs the model's own head.
        layer_output: Wraps a hidden state the way the model's layers return it.
        precision: A context in which layers compute in a lower precision; ``None`` for their own.
        outputs: Where to hold the outputs of linear layers for the gradient pass; ``None`` to release them.

    Returns:
        Keys and values, and the hidden state to continue from.

    Raises:
        RuntimeError: If a layer did not pass its keys and values to the cache.
    """
    cache = RecordingCache(
        length=inputs.shape[1], keep_graph=keep_graph, shared=inputs.shared, places=architecture.places
    )
    resume: list[Tensor] = []
    at_layers = gives_layers_the_cache(architecture, inputs)
    remakes = keep_graph and not saved_tensors_are_hooked()

    def run(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        args, kwargs = with_layer_input(args, kwargs, layer_input(args, kwargs).detach())
        if at_layers:
            args, kwargs = with_cache(architecture.layers[number], args, kwargs, cache)
        # The cache's update switches gradients off again: only keys and values keep their graph.
        with (
            torch.set_grad_enabled(keep_graph),
            remade_norms(architecture, number) if remakes else nullcontext(),
        ):
            return forward(*args, **kwargs)

    def skip(*args: Any, **kwargs: Any) -> Any:
        hidden = layer_input(args, kwargs)
        if not resume:
            resume.append(hidden)
        return layer_output(hidden)

    replacements: dict[nn.Module, Callable[..., Any]] = {**architecture.fused, **architecture.checkpoint_wrappers}
    if outputs is not None:
        replacements |= outputs.recording()
    for number, layer in enumerate(architecture.layers):
        replacements[layer] = (
            partial(run, number, architecture.checkpoint_wrappers.get(layer, layer.forward)) if number < depth else skip
        )
    with (
        without_checkpointing(architecture),
        _context_masks(model, architecture, inputs),
        replaced_forwards(replacements),
        nullcontext() if precision is None else precision,
        head_read_by(architecture, read_head),
    ):
        arguments = {**inputs.arguments(), **inputs.quiet}
        arguments |= {"use_cache": False} if at_layers else {architecture.cache_name: cache, "use_cache": True}
        output = model(**arguments)
    missing = sorted(set(range(depth)) - cache.recorded.keys())
    if missing:
        raise RuntimeError(f"layers {missing} did not pass their keys and values through the cache")
    logits = output.logits if read_head is None else None
    return Context(cache.recorded, resume[0] if resume else None, depth, logits, outputs)


def gives_layers_the_cache(architecture: Architecture, inputs: TokenInputs) -> bool:
    """Whether a pass gives its cache to the layers rather than the model; shared tokens are known to a cache alone."""
    return architecture.cache_at_layers and inputs.shared is None


def with_cache(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], cache: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments from a model without a cache, with one."""
    for part in layer.modules():  # inside a wrapper, if there is one
        place = _cache_place(type(part))
        if place is not None:
            number, name = place
            if number < len(args):
                return (*args[:number], cache, *args[number + 1 :]), kwargs
            return args, {**kwargs, name: cache}
    return args, kwargs


@functools.cache
def _cache_place(kind: type[nn.Module]) -> tuple[int, str] | None:
    """Place, after ``self``, and name of the cache among the arguments of a layer's forward, or of its base's."""
    for forward in filter(None, (vars(base).get("forward") for base in kind.__mro__)):
        names = list(inspect.signature(forward).parameters)[1:]
        found = next((name for name in (*CACHE_NAMES, "layer_past") if name in names), None)
        if found is not None:
            return names.index(found), found
    return None


@contextmanager
def _context_masks(model: nn.Module, architecture: Architecture, inputs: TokenInputs) -> Iterator[None]:
    # transformers detects packed documents only without a cache, so the mask built here separates them; without padding
    # and packing, its own shortcuts (plain causal attention) still apply.
    own_documents = gives_layers_the_cache(architecture, inputs)
    if inputs.padding is None and inputs.shared is None and (own_documents or inputs.segment is None):
        with nullcontext() if own_documents else whole_rows(architecture):
            yield
        return
    choose = implementation(model, inputs.position_ids.device.type)
    masks = routed_masks(inputs.visibility(), architecture=architecture, own_documents=own_documents)
    with attention_implementation(architecture, choose), masks:
        yield


@contextmanager
def head_read_by(architecture: Architecture, read_head: HeadReader | None) -> Iterator[None]:
    """Return the head's input instead of running the head; the model's use of the result is discarded.

    Hooks on the head concern its logits and are not run. With ``None``, the head runs as usual. A model that goes on to
    process its logits gets placeholders of the right shape.
    """
    if read_head is None:
        yield
        return

    def read(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        read_head(hidden)
        if architecture.head.fused:
            return hidden.detach()
        return hidden.new_zeros(()).expand(*hidden.shape[:-1], architecture.head.classes)

    head = architecture.head.module
    with replaced_forwards({head: read}), without_hooks(head) if has_hooks(head) else nullcontext():
        yield


@contextmanager
def head_at(architecture: Architecture, index: Tensor) -> Iterator[None]:
    """Run the head only on some positions: its logits are ``[B, K, V]``.

    Args:
        architecture: Of the model.
        index: int64 ``[B, K]``.
    """
    head = architecture.head.module
    own: Callable[..., Tensor] = head.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return own(hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[2])), *args, **kwargs)

    with replaced_forwards({head: forward}):
        yield


def ignore_head(hidden: Tensor) -> None:
    """A head reader for passes that do not need the head."""


def layer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state among a decoder layer's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def with_layer_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with the hidden state replaced."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
