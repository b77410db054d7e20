"""A batch without a label gives a zero loss that is connected to every parameter, whatever the settings."""

import pytest
import torch

from cggr_core import CGGRLinearLoss, CGGRLoss, CGGRModel, Selection, create_truncated_router
from tests.support.tiny_models import ROUTABLE

INPUT_IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
LABELS = torch.full_like(INPUT_IDS, -100)


def assert_zero_and_connected(model, loss):
    loss.backward()
    assert loss == 0.0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


SELECTIONS = ("stratified", "sampled", "random", "topk")


@pytest.mark.parametrize(
    ("gradient", "selection"),
    [
        *(
            (gradient, selection)
            for gradient in ("exact", "kv", "detached")
            for selection in (*SELECTIONS, "supervised")
        ),
        *(("sequence", selection) for selection in SELECTIONS),
    ],
)
def test_no_label_at_all(gradient, selection):
    model = ROUTABLE["llama"]().train()
    assert_zero_and_connected(
        model, CGGRModel(model, gradient=gradient, selection=selection).train()(INPUT_IDS, labels=LABELS)
    )


@pytest.mark.parametrize("gradient", ["kv", "detached"])
@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
def test_both_engines(gradient, engine):
    model = ROUTABLE["llama"]().train()
    wrapped = CGGRModel(model, create_truncated_router(model, 1), gradient=gradient, engine=engine).train()
    assert_zero_and_connected(model, wrapped(INPUT_IDS, labels=LABELS))


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
def test_a_selection_that_keeps_nothing(gradient):
    model = ROUTABLE["llama"]().train()
    selection = Selection.from_mask(torch.zeros_like(INPUT_IDS, dtype=torch.bool))
    wrapped = CGGRModel(model, gradient=gradient, selection="random").train()
    assert_zero_and_connected(model, wrapped(INPUT_IDS, labels=INPUT_IDS, selection=selection))


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
def test_a_row_without_a_label_changes_nothing_for_the_others(gradient):
    model = ROUTABLE["llama"]().train()
    wrapped = CGGRModel(model, gradient=gradient, selection="supervised").train()
    labels = INPUT_IDS.clone()
    labels[1] = -100
    both = wrapped(INPUT_IDS, labels=labels)
    torch.testing.assert_close(both, wrapped(INPUT_IDS[:1], labels=labels[:1]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gradient", ["exact", "kv", "sequence"])
@pytest.mark.parametrize("num_items", [0, torch.tensor(0), torch.tensor([0.0])])
def test_a_whole_step_without_a_label(gradient, num_items):
    model = ROUTABLE["llama"]().train()
    wrapped = CGGRModel(model, gradient=gradient).train()
    loss = wrapped(INPUT_IDS, labels=LABELS, num_items=num_items)
    assert_zero_and_connected(model, loss)
    with pytest.raises(ValueError, match="num_items must be above 0, got 0: the batch has 22 tokens with a target"):
        wrapped(INPUT_IDS, labels=INPUT_IDS, num_items=num_items)


@pytest.mark.parametrize("kind", [CGGRLoss, CGGRLinearLoss])
@pytest.mark.parametrize("training", [True, False])
def test_losses_of_a_step_without_a_target(kind, training):
    inputs, head = torch.randn(2, 8, 6, requires_grad=True), torch.randn(6, 6, requires_grad=True)
    operands = (inputs,) if kind is CGGRLoss else (inputs, head)
    loss = kind().train(training)(*operands, torch.full((2, 8), -100), num_items=0)
    loss.backward()
    assert loss == 0.0 and all(operand.grad is not None and not operand.grad.any() for operand in operands)
