"""Gradient routing equals an autograd reference, for every architecture, mode and engine."""

import pytest
import torch
from reference_routing import gradients, reference_loss, relative_error
from tiny_models import ROUTABLE, UNROUTABLE, VOCAB
from torch import Tensor

from cggr_core import CGGRModel, Selection, create_truncated_router
from cggr_core.targets import align_labels

TOLERANCE = 1e-5
BATCH, LENGTH = 2, 13
ENGINES = ("interleaved", "two_pass", "router")


def batch(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def random_selection(countable: Tensor, keep: int, seed: int = 0) -> Selection:
    """``keep`` countable tokens of every row (fewer where there are fewer), with uneven weights."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(countable.shape, generator=generator).masked_fill(~countable, -1.0)
    mask = torch.zeros_like(countable).scatter_(1, noise.topk(keep, dim=1).indices, True) & countable
    weight = torch.rand(countable.shape, generator=generator) + 0.5
    return Selection.from_mask(mask, weight=weight, countable=countable, capacity=keep)


def cggr(model, gradient: str, engine: str, **settings) -> CGGRModel:
    if engine == "router":
        # A selection that is passed in needs no scores, so the router's recorded layers are asked for by random scores.
        return CGGRModel(model, create_truncated_router(model, 1), gradient=gradient, **settings)
    return CGGRModel(model, gradient=gradient, engine=engine, selection="random", **settings)


def routed(model, labels, selection, *, gradient, engine, **inputs):
    wrapped = CGGRModel(model, gradient=gradient, engine=engine, selection="random")
    loss = wrapped(labels=labels, selection=selection, **inputs)
    loss.backward()
    return wrapped, loss.detach(), gradients(model)


def expected(model, labels, selection, *, gradient, **inputs):
    wrapped = CGGRModel(model, gradient="exact", selection="random")
    architecture = wrapped._passes.architecture
    targets = align_labels(labels, shifted=architecture.shifted, vocab_size=VOCAB)
    coefficients = torch.zeros(labels.shape).scatter_(1, selection.index, selection.weight * selection.valid)
    coefficients = coefficients / targets.countable.sum()
    loss, logits = reference_loss(
        model, architecture.layers, selection.mask, coefficients, targets.tokens, gradient=gradient, **inputs
    )
    loss.backward()
    return loss.detach(), gradients(model)


def countable_tokens(model, labels: Tensor) -> Tensor:
    architecture = CGGRModel(model, gradient="exact")._passes.architecture
    return align_labels(labels, shifted=architecture.shifted, vocab_size=VOCAB).countable


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
@pytest.mark.parametrize("gradient", ["kv", "detached"])
@pytest.mark.parametrize("name", ROUTABLE)
def test_equals_the_autograd_reference(name, gradient, engine):
    model, input_ids = ROUTABLE[name](), batch()
    labels = input_ids.clone()
    labels[0, :5] = -100
    selection = random_selection(countable_tokens(model, labels), keep=5)
    _, loss, found = routed(model, labels, selection, gradient=gradient, engine=engine, input_ids=input_ids)
    reference, wanted = expected(model, labels, selection, gradient=gradient, input_ids=input_ids)
    torch.testing.assert_close(loss, reference, rtol=TOLERANCE, atol=0)
    assert relative_error(found, wanted) <= TOLERANCE
