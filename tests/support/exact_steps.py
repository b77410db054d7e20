"""Steps with a selection of their own, and what an autograd graph over all tokens makes of it."""

import torch
from torch import Tensor

from cggr_core import CGGRModel, Selection, loss_coefficients
from cggr_core.targets import align_labels
from tests.support.reference_routing import gradients, reference_loss, relative_error
from tests.support.tiny_models import VOCAB

TOLERANCE = 1e-5
BATCH, LENGTH, KEEP = 2, 13, 5
# Where a mode takes no path of its own through an architecture: with grouped keys, experts, and a masked-LM head.
A_FEW = ("llama", "mixtral", "bert-masked")


def batch(seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


def partly_labelled() -> tuple[Tensor, Tensor]:
    """Token ids and labels, of which the first row has none at its start."""
    input_ids = batch()
    labels = input_ids.clone()
    labels[0, :4] = -100
    return input_ids, labels


def aligned(model, labels: Tensor):
    return align_labels(labels, shifted=CGGRModel(model)._passes.architecture.shifted, vocab_size=VOCAB)


def random_selection(countable: Tensor, seed: int = 0) -> Selection:
    """At most ``KEEP`` countable tokens of every row, with uneven weights; the first row has fewer than the second."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(countable.shape, generator=generator).masked_fill(~countable, -1.0)
    mask = torch.zeros_like(countable).scatter_(1, noise.topk(KEEP, dim=1).indices, True) & countable
    mask[0] &= mask[0].cumsum(0) <= KEEP - 2
    weight = torch.rand(countable.shape, generator=generator) + 0.5
    return Selection.from_mask(mask, weight=weight, countable=countable, capacity=KEEP)


def reference(model, labels, selection, *, gradient, **inputs):
    targets = aligned(model, labels)
    coefficients = torch.zeros(labels.shape).scatter_(
        1, selection.index, loss_coefficients(selection, targets.countable)
    )
    layers = CGGRModel(model)._passes.architecture.layers
    loss, _ = reference_loss(model, layers, selection.mask, coefficients, targets.tokens, gradient=gradient, **inputs)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_equal(found, wanted):
    (loss, grads), (wanted_loss, wanted_grads) = found, wanted
    torch.testing.assert_close(loss, wanted_loss, rtol=TOLERANCE, atol=0)
    assert relative_error(grads, wanted_grads) <= TOLERANCE
