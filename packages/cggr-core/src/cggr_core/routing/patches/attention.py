"""Attention in transformers: mask builders, packed documents and implementations."""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from cggr_core.routing.architectures import Architecture

MaskBuilder = Callable[..., Any]
ChangeBuilder = Callable[[str, MaskBuilder], MaskBuilder]
FindDocuments = Callable[[Tensor], Tensor | None]

_change_of_builders: ContextVar[ChangeBuilder | None] = ContextVar("change_of_builders", default=None)
_documents: ContextVar[FindDocuments | None] = ContextVar("documents", default=None)
_models: ContextVar[tuple[Any, ...] | None] = ContextVar("models", default=None)
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
        return build if change is None or not _asked_by_the_models_of_the_pass() else change(name, build)


_find_packed_sequences = masking_utils.find_packed_sequence_indices


def _find_packed_sequences_in_context(position_ids: Tensor) -> Tensor | None:
    find = _documents.get() if _some_pass_runs else None
    if find is None or not _asked_by_the_models_of_the_pass():
        return _find_packed_sequences(position_ids)
    return find(position_ids)


def _asked_by_the_models_of_the_pass() -> bool:
    """Whether the model that is building masks is one of the pass, rather than one that a hook or a layer of it calls.

    Mask builders are not given the model, and a teacher may even share the config: the callers show which one it is.
    """
    models = _models.get()
    frame = None if models is None else sys._getframe(2)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, PreTrainedModel):
            return any(caller is model for model in models or ())
        frame = frame.f_back
    return True


# Scope: the process, from the first import on; outside the blocks below, both behave as in transformers.
ALL_MASK_ATTENTION_FUNCTIONS.__class__ = _BuildersInContext
masking_utils.find_packed_sequence_indices = _find_packed_sequences_in_context


@contextmanager
def changed_mask_builders(
    change: ChangeBuilder, *, architecture: Architecture | None, documents: FindDocuments | None = None
) -> Iterator[None]:
    """Replace the mask builders that a model gets from transformers' registry.

    Scope: mask builders that the model looks up within the block and its context; other models that run inside its
    forward, and other threads, see transformers' own.

    Args:
        change: Maps a builder's name and the builder to the one to use.
        architecture: Of the model; ``None`` for every model.
        documents: Maps position ids ``[B, S]`` to the document of every token of packed rows, or ``None`` for rows that
            are not packed; replaces transformers' own function, which reads them on the host.
    """
    global _passes, _some_pass_runs
    changed = _change_of_builders.set(change)
    told = None if documents is None else _documents.set(documents)
    models = _models.set(None if architecture is None else architecture.configured)
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
        _models.reset(models)
        _change_of_builders.reset(changed)


@contextmanager
def documents_found_by(find: FindDocuments) -> Iterator[None]:
    """Use another function to find packed documents, wherever mask builders are changed within the block."""
    told = _documents.set(find)
    try:
        yield
    finally:
        _documents.reset(told)


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
