"""Forward and backward of a routed model, in one line of a test."""

import torch

from cggr_core import CGGRModel
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import VOCAB

MODES = ("exact", "kv", "detached", "sequence")
ROUTED = [("kv", "interleaved"), ("kv", "two_pass"), ("detached", "interleaved"), ("detached", "two_pass")]


def tokens(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids ``[rows, length]``."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def backward(wrapped: CGGRModel, input_ids, **inputs):
    """Loss and gradients of one step; the gradients are cleared."""
    inputs.setdefault("labels", input_ids)
    loss = wrapped(input_ids, **inputs)
    loss.backward()
    return loss.detach(), gradients(wrapped.model)


def assert_plain_step(wrapped: CGGRModel, model: torch.nn.Module, input_ids: torch.Tensor) -> None:
    """A step that keeps every token has the loss and gradients of ``model``: the wrapped one, or a wrapper of it."""
    plain = model(input_ids=input_ids, labels=input_ids).loss
    plain.backward()
    wanted = gradients(wrapped.model)
    loss, found = backward(wrapped, input_ids)
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=1e-6)
    assert relative_error(found, wanted) <= 1e-5


def routed(model, gradient="kv", engine=None, **settings) -> CGGRModel:
    """A CGGRModel with a selection that the engine can have."""
    selection = settings.pop("selection", "random" if engine == "interleaved" else "sampled")
    return CGGRModel(model, gradient=gradient, engine=engine, selection=selection, **settings)


def checkpoint_activations(model, *, use_reentrant=False):
    """Switch activation checkpointing on, whatever this version of transformers calls it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # before transformers 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    else:
        enable(activation_checkpointing_kwargs={"use_reentrant": use_reentrant})
