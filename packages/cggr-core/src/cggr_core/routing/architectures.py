"""A description of a Hugging Face model for the engines: its layers, its head, and the source of its positions."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cggr_core.routing import own_code
from cggr_core.routing.heads import Head, find_head

# RoBERTa and its descendants count positions from padding_idx + 1 and skip padding.
_MAKES_POSITIONS = "create_position_ids_from_input_ids"
# Names of the cache argument: before transformers 5.24, and since.
CACHE_NAMES = ("past_key_values", "cache")
# What a model raises when it does not run as asked.
MODEL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError)
# Layer types with their own state instead of keys and values.
_STATEFUL = ("mamba", "linear", "recurrent", "conv", "ssm", "rwkv")


@dataclass(frozen=True)
class Architecture:
    """The parts of a model that routing touches.

    Attributes:
        layers: Decoder or encoder layers, in order; empty if they were not found.
        places: Maps a layer's cache index to its position among the layers, if layers were removed or moved after
            numbering; else empty.
        head: The language-model head.
        shifted: Whether the logits at position t predict the token at t + 1 (causal) or at t (masked LM).
        counts_padding: Whether the model's own loss counts labels of padding.
        obstacle: Why keys and values cannot be routed; ``None`` if they can.
        takes_positions: Whether the model's forward takes ``position_ids``, by name or among any further arguments.
        cache_name: Name of the key/value cache in the model's forward, one of :data:`CACHE_NAMES`.
        configured: The modules with a config, which holds the attention implementation.
        checkpointing: The modules that carry transformers' switch for gradient checkpointing.
        checkpoint_wrappers: Modules that torch's own checkpointing recomputes, with what it runs: wrappers
            (``checkpoint_wrapper``), and modules whose ``forward`` is ``partial(checkpoint, module.forward, ...)``.
        position_maker: The module that makes position ids from token ids (RoBERTa), or ``None``.
        norms: The norms of every layer.
        linears: The plain linear layers of every layer.
        cache_at_layers: Whether the layers are given a cache of which the model itself knows nothing: code of others
            around them may make positions, documents and masks, and transformers makes others with a cache.
        own_code: Whether code of others runs anywhere in the model.
        whole_after_layers: Whether the model needs full-length rows from its layers, even if it reads only part of them
            afterwards; unknown until the model has been probed.
        fused: Norms, attentions and gated MLPs, each with the forward that the passes run in its place; empty until the
            model has been probed.
    """

    layers: nn.ModuleList
    places: Mapping[int, int]
    head: Head
    shifted: bool
    obstacle: str | None
    takes_positions: bool
    cache_name: str
    configured: tuple[nn.Module, ...]
    checkpointing: tuple[nn.Module, ...]
    checkpoint_wrappers: Mapping[nn.Module, Callable[..., Any]]
    position_maker: Any
    norms: tuple[tuple[nn.Module, ...], ...]
    linears: tuple[tuple[nn.Linear, ...], ...]
    cache_at_layers: bool
    own_code: bool
    counts_padding: bool = True
    whole_after_layers: bool = False
    fused: Mapping[nn.Module, Callable[..., Any]] = field(default_factory=dict)


def unwrapped(model: nn.Module) -> Any:
    """The Hugging Face model inside a PEFT wrapper, or ``model`` itself; its attributes depend on its class."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def describe(model: nn.Module) -> Architecture:
    """Find the layers and the head of a Hugging Face language model.

    Args:
        model: A causal or masked language model, possibly wrapped by PEFT.

    Returns:
        Its description; the model is neither copied nor changed.

    Raises:
        TypeError: If ``model`` is not a Hugging Face model.
        ValueError: If it has no output embedding, or is an encoder-decoder model.
    """
    base = unwrapped(model)
    config: Any = getattr(base, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(base, "get_output_embeddings"):
        advice = f"; load it first: AutoModelForCausalLM.from_pretrained({model!r})" if isinstance(model, str) else ""
        raise TypeError(
            f"model must be a Hugging Face transformers language model (PreTrainedModel or a PEFT wrapper of one), "
            f"got {type(model).__name__}{advice}"
        )
    if config.is_encoder_decoder:
        raise ValueError(
            f"{type(base).__name__} is an encoder-decoder model, and CGGR routes causal and masked language models; "
            "train it with its own forward"
        )
    text_config = config.get_text_config()
    layers, owner = _find_layers(base, text_config)
    parameters = inspect.signature(base.forward).parameters.values()
    # Cached: walking all modules takes as long as launching a layer, and every pass would do it several times.
    modules = list(model.modules())
    numbers = _numbers(layers)
    return Architecture(
        layers=layers,
        places={number: place for place, number in enumerate(numbers) if number != place},
        head=find_head(base, text_config),
        shifted=getattr(base, "loss_type", None) != "ForMaskedLM",
        obstacle=_obstacle(base, text_config, owner) or _same_number(base, layers, numbers)
        if layers
        else f"the layers of {type(base).__name__} were not found: it has no ModuleList of length "
        f"config.num_hidden_layers={getattr(text_config, 'num_hidden_layers', None)}",
        # Some forwards pass on all keyword arguments.
        takes_positions=any(each.name == "position_ids" or each.kind is each.VAR_KEYWORD for each in parameters),
        cache_name=_cache_name(base, owner),
        configured=tuple(module for module in modules if getattr(module, "config", None) is not None),
        checkpointing=tuple(module for module in modules if hasattr(module, "gradient_checkpointing")),
        checkpoint_wrappers={
            module: wrapped for module in modules if (wrapped := _recomputed_by_torch(module)) is not None
        },
        position_maker=next((module for module in modules if hasattr(module, _MAKES_POSITIONS)), None),
        norms=tuple(tuple(module for module in layer.modules() if _is_norm(module)) for layer in layers),
        linears=tuple(tuple(module for module in layer.modules() if type(module) is nn.Linear) for layer in layers),
        cache_at_layers=own_code.surrounds_layers(model, base, layers),
        own_code=own_code.is_in(model),
    )


def _recomputed_by_torch(module: nn.Module) -> Callable[..., Any] | None:
    """What torch's own checkpointing runs in place of a module's forward, if it does."""
    if hasattr(module, "checkpoint_fn"):
        return module._modules.get("_checkpoint_wrapped_module")
    forward = module.__dict__.get("forward")
    if not isinstance(forward, partial) or forward.func is not checkpoint or len(forward.args) != 1:
        return None
    return forward.args[0] if forward.keywords.get("use_reentrant") is False else None


def _is_norm(module: nn.Module) -> bool:
    alone = not module._modules and not module._buffers
    return alone and "norm" in type(module).__name__.lower()


def _find_layers(base: Any, config: Any) -> tuple[nn.ModuleList, nn.Module]:
    # Vision towers can have as many layers as the text model, so the text decoder is searched first.
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    # In decoders of encoder-decoder models, num_hidden_layers is the number of encoder layers.
    for setting in ("decoder_layers", "num_hidden_layers"):
        count = getattr(config, setting, 0)
        for root in (decoder, base):
            if not isinstance(root, nn.Module):
                continue
            found = [
                (name.count("."), name, module)
                for name, module in root.named_modules()
                if isinstance(module, nn.ModuleList) and len(module) == count
            ]
            if found:
                _, name, layers = min(found, key=lambda item: item[:2])
                return layers, root.get_submodule(name.rpartition(".")[0])
    return nn.ModuleList(), base


def _numbers(layers: nn.ModuleList) -> list[int]:
    """The index under which each layer uses the cache; its place in the list if the layer has no single index."""
    found = [
        {number for part in layer.modules() if type(number := getattr(part, "layer_idx", None)) is int}
        for layer in layers
    ]
    return [place if len(numbers) != 1 else numbers.pop() for place, numbers in enumerate(found)]


def _same_number(base: nn.Module, layers: nn.ModuleList, numbers: list[int]) -> str | None:
    if len(set(numbers)) == len(numbers):
        return None
    first, second = next((a, b) for b in range(len(numbers)) for a in range(b) if numbers[a] == numbers[b])
    if layers[first] is layers[second]:
        return f"layers {first} and {second} of {type(base).__name__} are one module that runs twice in a forward"
    return (
        f"layers {first} and {second} of {type(base).__name__} share the cache index layer_idx={numbers[first]} (were "
        "they copied?); renumber every layer's modules before training"
    )


def _obstacle(base: nn.Module, config: Any, owner: nn.Module) -> str | None:
    name = type(base).__name__
    layer_types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or []
    stateful = sorted({kind for kind in layer_types if any(word in kind for word in _STATEFUL)})
    if stateful:
        return f"{name} has layers without keys and values ({', '.join(stateful)})"
    if _cache_parameter(owner) is None:
        return f"{name} keeps no key/value cache"
    return None


def _cache_parameter(module: nn.Module) -> str | None:
    # A subclass's forward may pass further arguments on to its base's.
    inherited = (vars(kind).get("forward") for kind in type(module).__mro__)
    for forward in (module.forward, *filter(None, inherited)):
        parameters = inspect.signature(forward).parameters
        named = next((name for name in CACHE_NAMES if name in parameters), None)
        if named is not None or not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
            return named
    return None


def _cache_name(base: nn.Module, owner: nn.Module) -> str:
    # A masked language model forwards the cache among its keyword arguments, so the inner module that takes it
    # determines its name.
    takers = (base, getattr(base, "base_model", base), owner)
    return next((name for module in takers if (name := _cache_parameter(module)) is not None), CACHE_NAMES[0])


def default_position_ids(
    model: nn.Module, architecture: Architecture, input_ids: Tensor | None, like: Tensor, padding: Tensor | None
) -> Tensor:
    """The position ids that the model would create itself, made explicit so that kept tokens can carry theirs.

    Args:
        model: The model.
        architecture: Its description.
        input_ids: ``[B, S]`` int64, or ``None`` when embeddings are given.
        like: ``[B, S, ...]``, gives shape and device.
        padding: ``[B, S]``, the attention mask (0 = padding), or ``None``.

    Returns:
        int64 ``[B, S]``.
    """
    batch, length = like.shape[:2]
    positions = torch.arange(length, device=like.device).expand(batch, length)
    if getattr(unwrapped(model).config, "model_type", None) == "opt" and padding is not None:
        seen = padding.long()
        return seen.cumsum(1) * seen - 1
    maker = architecture.position_maker
    if maker is None:
        return positions
    if input_ids is None:
        return positions + maker.padding_idx + 1
    return maker.create_position_ids_from_input_ids(input_ids, maker.padding_idx)
