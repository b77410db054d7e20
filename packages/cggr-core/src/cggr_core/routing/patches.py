"""Every change to an object of transformers or torch, in one place, each with its scope in its docstring.

All of them nest and are always undone. Two models may run in two threads: changes to a model affect only that model,
and whatever models share is changed once, at import, by code that checks its calling context. A single model must not
run in two threads at a time.
"""

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from cggr_core.routing.architectures import Architecture

MaskBuilder = Callable[..., Any]
ChangeBuilder = Callable[[str, MaskBuilder], MaskBuilder]
FindDocuments = Callable[[Tensor], Tensor | None]

# Attribute names of noise rates in training.
_NOISE = re.compile(r"drop|jitter").search
_SMALL = 0.1

_change_of_builders: ContextVar[ChangeBuilder | None] = ContextVar("change_of_builders", default=None)
_documents: ContextVar[FindDocuments | None] = ContextVar("documents", default=None)
# Compiled code cannot read context variables, and need not while no pass runs: it then gets transformers' own builders.
_some_pass_runs = False
_passes = 0
_lock = threading.Lock()


class _BuildersInContext(AttentionMaskInterface):
    """The registry of mask builders, with the changes that apply in the caller's context."""

    def __getitem__(self, name: str) -> MaskBuilder:
        build = super().__getitem__(name)
        if not _some_pass_runs:
            return build
        change = _change_of_builders.get()
        return build if change is None else change(name, build)


_find_packed_sequences = masking_utils.find_packed_sequence_indices


def _find_packed_sequences_in_context(position_ids: Tensor) -> Tensor | None:
    find = _documents.get() if _some_pass_runs else None
    return (find or _find_packed_sequences)(position_ids)


# Scope: the process, from the first import on; outside the blocks below, both behave as in transformers.
ALL_MASK_ATTENTION_FUNCTIONS.__class__ = _BuildersInContext
masking_utils.find_packed_sequence_indices = _find_packed_sequences_in_context


@contextmanager
def changed_mask_builders(change: ChangeBuilder, *, documents: FindDocuments | None = None) -> Iterator[None]:
    """Replace the mask builders that models get from transformers' registry.

    Scope: mask builders of any model that are looked up within the block and its context; other threads see
    transformers' own.

    Args:
        change: Maps a builder's name and the builder to the one to use.
        documents: Maps position ids ``[B, S]`` to the document of every token of packed rows, or ``None`` for rows that
            are not packed; replaces transformers' own function, which reads them on the host.
    """
    global _passes, _some_pass_runs
    changed = _change_of_builders.set(change)
    told = None if documents is None else _documents.set(documents)
    with _lock:
        _passes += 1
        _some_pass_runs = True
    try:
        yield
    finally:
        with _lock:
            _passes -= 1
            _some_pass_runs = _passes > 0
        if told is not None:
            _documents.reset(told)
        _change_of_builders.reset(changed)


def register_attention(name: str, attend: Callable[..., Any], build_mask: MaskBuilder) -> None:
    """Register an attention implementation with transformers.

    Scope: the process; nothing runs on it unless a config names it.

    Args:
        name: A new name.
        attend: The attention function.
        build_mask: Its mask builder.
    """
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, build_mask)


@contextmanager
def replaced_forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the ``forward`` of modules within the block.

    The instance attribute is set, not the class: ``module(...)`` still runs its hooks (those of FSDP2, for one)
    around the replacement.

    Scope: these modules, whoever calls them.
    """
    before = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, forward in replacements.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = forward


@contextmanager
def left_gathered(groups: Iterable[Any]) -> Iterator[None]:
    """Let weights that FSDP2 gathers for a forward stay gathered after it.

    Sets the attribute behind ``set_reshard_after_forward(False)`` and restores it, since there is no public way to read
    the user's choice.

    Scope: these groups of parameters, whoever calls their modules.
    """
    before = [(group, group.post_forward_mesh_info) for group in groups]
    try:
        for group, _ in before:
            group.post_forward_mesh_info = None
        yield
    finally:
        for group, chosen in before:
            group.post_forward_mesh_info = chosen


@contextmanager
def replaced_parameters(model: nn.Module, replacements: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Replace parameters of modules within the block.

    Scope: the modules of this model, whoever calls them.

    Args:
        model: The model.
        replacements: The new parameter for each current one, shared ones included.
    """
    before = [
        (module._parameters, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter in replacements
    ]
    try:
        for parameters, name, parameter in before:
            parameters[name] = replacements[parameter]
        yield
    finally:
        for parameters, name, parameter in before:
            parameters[name] = parameter


@contextmanager
def own_parameters(module: nn.Module, parameters: dict[str, nn.Parameter | None]) -> Iterator[None]:
    """Restore the parameters that a module had in an earlier call.

    Scope: this module's own parameters, whoever calls it.
    """
    before = module._parameters
    module.__dict__["_parameters"] = parameters
    try:
        yield
    finally:
        module.__dict__["_parameters"] = before


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """Let a module be called inside its own call without running its forward hooks a second time.

    Scope: this module, whoever calls it.
    """
    before = {name: module.__dict__[name] for name in ("_forward_pre_hooks", "_forward_hooks")}
    try:
        module.__dict__.update({name: OrderedDict() for name in before})
        yield
    finally:
        module.__dict__.update(before)


@contextmanager
def forward_replaced_by(module: nn.Module, run: Callable[..., Any]) -> Iterator[None]:
    """Redirect a call of a module to ``run``, inside which the module is restored.

    The module's hooks and wrappers see one ordinary call, whatever ``run`` does with the module.

    Scope: this module, whoever calls it.
    """
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with replaced_forwards({module: own}), without_hooks(module):
            return run(*args, **kwargs)

    with replaced_forwards({module: forward}):
        yield


@contextmanager
def without_checkpointing(architecture: Architecture) -> Iterator[None]:
    """Disable Hugging Face's own gradient checkpointing, which drops the cache that routing relies on.

    Scope: the modules of this model.
    """
    switched: list[Any] = [
        module for module in architecture.checkpointing if module.__dict__.get("gradient_checkpointing") is True
    ]
    try:
        for module in switched:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True


def recomputes_with_torch(module: nn.Module) -> bool:
    """Whether a module's gradient checkpointing is torch's non-reentrant one, the default of transformers."""
    checkpoints = module.__dict__.get("_gradient_checkpointing_func")
    return (
        isinstance(checkpoints, partial)
        and checkpoints.func is checkpoint
        and checkpoints.keywords.get("use_reentrant") is False
    )


@contextmanager
def without_random_states(architecture: Architecture) -> Iterator[None]:
    """Let checkpointed layers be recomputed without restoring the random state of their forward.

    Scope: the modules of this model for which :func:`recomputes_with_torch` is true.
    """
    switched: list[tuple[Any, Any]] = [
        (module, module.__dict__["_gradient_checkpointing_func"])
        for module in architecture.checkpointing
        if module.__dict__.get("gradient_checkpointing") is True and recomputes_with_torch(module)
    ]
    try:
        for module, keeps in switched:
            module._gradient_checkpointing_func = partial(keeps, preserve_rng_state=False)
        yield
    finally:
        for module, keeps in switched:
            module._gradient_checkpointing_func = keeps


def without_checkpoint_wrappers(architecture: Architecture) -> AbstractContextManager[None]:
    """Bypass torch's own checkpoint wrappers.

    Scope: the wrappers of this model.
    """
    return replaced_forwards(architecture.checkpoint_wrappers) if architecture.checkpoint_wrappers else nullcontext()


def uses_checkpointing(layer: nn.Module) -> bool:
    """Whether transformers was asked to recompute this layer in the backward pass."""
    return layer.training and layer.__dict__.get("gradient_checkpointing") is True


@contextmanager
def attention_implementation(architecture: Architecture, choose: Callable[[str], str]) -> Iterator[None]:
    """Within the block, switch every (sub)config of the model to another attention implementation.

    Scope: these configs, and so any other model that shares one of the config objects.
    """
    configs: dict[int, Any] = {id(module.config): module.config for module in architecture.configured}
    before = {
        key: config._attn_implementation for key, config in configs.items() if hasattr(config, "_attn_implementation")
    }
    try:
        for key, name in before.items():
            # The internal attribute: the public setter also visits sub-configs, and may refuse.
            configs[key]._attn_implementation_internal = choose(name)
        yield
    finally:
        for key, name in before.items():
            configs[key]._attn_implementation_internal = name


@contextmanager
def smaller_vocabulary(configured: Iterable[nn.Module], classes: int, fewer: int) -> Iterator[None]:
    """Let models and configs report a smaller vocabulary to their losses.

    Scope: these modules and their configs, and so any other model that shares one of the config objects.

    Args:
        configured: The modules that hold a config.
        classes: Size of the vocabulary.
        fewer: The size to report.
    """
    holders: dict[int, Any] = {}
    for module in configured:
        config: Any = module.config
        for holder in (module, config, config.get_text_config() if hasattr(config, "get_text_config") else config):
            holders[id(holder)] = holder
    said = [
        (holder.__dict__, name)
        for holder in holders.values()
        for name, value in vars(holder).items()
        if "vocab_size" in name and type(value) is int and value == classes
    ]
    try:
        # Written to ``__dict__``, since configs validate attributes when they are set.
        for values, name in said:
            values[name] = fewer
        yield
    finally:
        for values, name in said:
            values[name] = classes


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Make a model in training mode deterministic: dropout and jitter rates are 0.

    Scope: the rates that its modules hold; rates read from a config are unchanged.
    """
    rates = [
        (module, name, value)
        for module in model.modules()
        for name, value in module.__dict__.items()
        if isinstance(value, float) and value and (name == "p" if isinstance(module, _DropoutNd) else _NOISE(name))
    ]
    try:
        for module, name, _ in rates:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, value in rates:
            setattr(module, name, value)


@contextmanager
def grown_parameters(model: nn.Module) -> Iterator[bool]:
    """Replace parameters that hold one small value throughout, as many do at the start of training, by random numbers.

    A zero projection hides everything before it. Sharded and offloaded parameters are unchanged.

    Scope: the values of these parameters. Their version counters do not change, since a backward pass may be pending.

    Yields:
        Whether there are any.
    """
    constant = {
        parameter: float(first)
        for parameter in model.parameters()
        if type(parameter.data) is Tensor
        and parameter.is_floating_point()
        and not parameter.is_meta
        and parameter.numel() > 1
        and abs(float(first := parameter.data.flatten()[0])) < _SMALL
        and bool((parameter.data == first).all())
    }
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in constant:
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * scale)
        yield bool(constant)
    finally:
        for parameter, value in constant.items():
            parameter.data.fill_(value)


@contextmanager
def nothing_left(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo the side effects of forwards in the block: running statistics, power iterations, advanced random generators.

    A module that replaces a buffer (rotary frequencies that depend on the longest row so far) keeps the reason in its
    attributes, which are restored with it.

    Scope: the existing buffers of this model, the public attributes of modules that replace some, and the random
    generators.

    Args:
        model: The model.
        device: Where it runs.
    """
    before = [
        (
            module,
            {name: (buffer, None if buffer is None else buffer.clone()) for name, buffer in module._buffers.items()},
            {name: value for name, value in module.__dict__.items() if not name.startswith("_")},
        )
        for module in model.modules()
        if module._buffers
    ]
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            yield
    finally:
        for module, buffers, attributes in before:
            if any(module._buffers.get(name) is not buffer for name, (buffer, _) in buffers.items()):
                for name in [name for name in module.__dict__ if not (name.startswith("_") or name in attributes)]:
                    del module.__dict__[name]
                module.__dict__.update(attributes)
            for name, (buffer, values) in buffers.items():
                module._buffers[name] = buffer
                if buffer is not None and values is not None:
                    buffer.data.copy_(values)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode.

    Scope: its modules, each of which gets its own flag back.
    """
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def attention_of_any_mask() -> Iterator[None]:
    """Let SDPA fall back to its math backend even if the user allows flash attention only, since probes pass masks.

    Scope: all of torch, on CPUs too, despite the switch's name.
    """
    allowed = torch.backends.cuda.math_sdp_enabled()
    torch.backends.cuda.enable_math_sdp(True)
    try:
        yield
    finally:
        torch.backends.cuda.enable_math_sdp(allowed)
