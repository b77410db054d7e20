"""``shift_labels``, transformers' keyword for labels that are already shifted."""

from itertools import product

import pytest
import torch

from cggr_core import Selection, loss_coefficients
from cggr_core.targets import align_labels
from tests.support.model_steps import MODES, ROUTED, backward, routed, tokens
from tests.support.reference_routing import gradients, reference_loss, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB

TOLERANCE = 1e-5


def labels_two_ahead(input_ids: torch.Tensor) -> torch.Tensor:
    """As no model would shift them, the first tokens of the first row ignored."""
    labels = input_ids.roll(-2, dims=1)
    labels[:, -2:] = -100
    labels[0, :3] = -100
    return labels


def equal(found, wanted) -> bool:
    (loss, grads), (wanted_loss, wanted_grads) = found, wanted
    torch.testing.assert_close(loss, wanted_loss, rtol=TOLERANCE, atol=0)
    return relative_error(grads, wanted_grads) <= TOLERANCE


@pytest.mark.parametrize("gradient", MODES)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_everything_kept_is_the_models_own_step(name, gradient):
    model, input_ids = ROUTABLE[name](), tokens()
    if name == "mixtral":
        model.config.output_router_logits = True
    shift_labels = labels_two_ahead(input_ids)
    # Balancing losses count with their batch's share of the items, in transformers whole in every batch.
    for more in ({},) if name == "mixtral" else ({}, {"num_items_in_batch": 100}):
        loss = model(input_ids=input_ids, labels=input_ids, shift_labels=shift_labels, **more).loss
        loss.backward()
        own = loss.detach(), gradients(model)
        wrapped = routed(model, gradient, min_tokens_ratio=1.0)
        assert equal(backward(wrapped, input_ids, shift_labels=shift_labels, **more), own)


@pytest.mark.parametrize(("gradient", "engine"), [("exact", None), *ROUTED])
def test_chosen_tokens_are_those_of_the_autograd_reference(gradient, engine):
    model, input_ids = ROUTABLE["llama"](), tokens()
    shift_labels = labels_two_ahead(input_ids)
    targets = align_labels(shift_labels, shifted=False, vocab_size=VOCAB)
    mask = targets.countable & (torch.arange(12) % 4 == 1)
    selection = Selection.from_mask(mask, countable=targets.countable, capacity=3)
    coefficients = torch.zeros(input_ids.shape).scatter_(
        1, selection.index, loss_coefficients(selection, targets.countable)
    )
    loss, _ = reference_loss(
        model, model.model.layers, mask, coefficients, targets.tokens, gradient=gradient, input_ids=input_ids
    )
    loss.backward()
    wanted = loss.detach(), gradients(model)
    wrapped = routed(model, gradient, engine)
    assert equal(backward(wrapped, input_ids, shift_labels=shift_labels, selection=selection), wanted)


@pytest.mark.parametrize(
    ("gradient", "selection"),
    [
        *product(MODES, ("stratified", "sampled", "random", "topk")),
        *product(("exact", "kv", "detached"), ("sequence_aware", "supervised")),
    ],
)
def test_aligned_as_the_model_aligns_them_they_change_nothing(gradient, selection):
    model, input_ids = ROUTABLE["llama"](), tokens()
    labels = input_ids.clone()
    labels[0, :5] = -100
    shift_labels = torch.cat([labels[:, 1:], torch.full((3, 1), -100)], dim=1)
    found = []
    for more in ({}, {"shift_labels": shift_labels}):
        wrapped = routed(model, gradient, selection=selection, min_tokens_ratio=0.25).train()
        found.append(backward(wrapped, input_ids, labels=labels, draw=1, **more))
    assert equal(*found)


@pytest.mark.parametrize("name", ["bert-masked", "roberta-masked"])
def test_a_loss_that_does_not_read_them_is_said_by_name(name):
    model, input_ids = ROUTABLE[name](), tokens()
    with pytest.raises(ValueError, match=r"shift_labels: the loss of .* does not use them"):
        routed(model, "exact").train()(input_ids, labels=input_ids, shift_labels=input_ids)


@pytest.mark.parametrize(
    ("shift_labels", "error", "said"),
    [
        (torch.ones(3, 11, dtype=torch.int64), ValueError, "shift_labels must have shape"),
        (torch.ones(3, 12), TypeError, "must be torch.int64"),
        ([[1] * 12] * 3, TypeError, "shift_labels must be a tensor, got list"),
    ],
)
def test_others_than_labels_are_refused(shift_labels, error, said):
    with pytest.raises(error, match=said):
        routed(ROUTABLE["llama"]()).train()(tokens(), labels=tokens(), shift_labels=shift_labels)
