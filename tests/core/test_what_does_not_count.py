"""The values of tokens that do not count reach no loss, gradient or metric, even NaN, although NaN times 0 is NaN."""

import pytest
import torch

from cggr_core import CGGRLinearLoss, CGGRLoss, CGGRModel
from tests.support.reference_routing import gradients
from tests.support.tiny_models import ROUTABLE

SHAPE, VOCAB, HIDDEN = (2, 8), 13, 6
GENERATOR = torch.Generator().manual_seed(0)
TARGETS = torch.randint(0, VOCAB, SHAPE, generator=GENERATOR)
TARGETS[0, 2] = -100
TARGETS[1] = -100
IGNORED = TARGETS == -100


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def of_logits(criterion, fill):
    logits = random(*SHAPE, VOCAB).masked_fill(IGNORED[:, :, None], fill).requires_grad_()
    weight, reference = (random(*SHAPE).abs().masked_fill(IGNORED, fill) for _ in range(2))
    excess = {"reference_nll": reference} if criterion.settings.scoring == "excess" else {}
    loss = criterion(logits, TARGETS, token_weight=weight, **excess, draw=3)
    loss.backward()
    return loss, logits.grad


def of_hidden(criterion, fill):
    hidden = random(*SHAPE, HIDDEN).masked_fill(IGNORED[:, :, None], fill).requires_grad_()
    head, bias = random(VOCAB, HIDDEN).requires_grad_(), random(VOCAB).requires_grad_()
    reference = random(*SHAPE).masked_fill(IGNORED, fill)
    excess = {"reference_nll": reference} if criterion.settings.scoring == "excess" else {}
    loss = criterion(hidden, head, TARGETS, bias=bias, **excess, draw=3)
    loss.backward()
    return loss, hidden.grad, head.grad, bias.grad


@pytest.mark.parametrize("fill", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("ratio", [0.25, 1.0])
@pytest.mark.parametrize("selection", ["stratified", "random", "topk", "sequence_aware"])
@pytest.mark.parametrize(("kind", "run"), [(CGGRLoss, of_logits), (CGGRLinearLoss, of_hidden)])
def test_ignored_rows_of_a_loss(kind, run, selection, ratio, training, fill):
    for scoring in ("gradnorm", "excess"):
        settings = {"selection": selection, "scoring": scoring, "min_tokens_ratio": ratio}
        clean, dirty = kind(**settings).train(training), kind(**settings).train(training)
        for wanted, found in zip(run(clean, 0.0), run(dirty, fill), strict=True):
            assert torch.equal(wanted, found)
        assert clean.metrics.keys() == dirty.metrics.keys()
        assert all(torch.equal(clean.metrics[name], dirty.metrics[name]) for name in clean.metrics)


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize("selection", ["stratified", "random", "supervised"])
@pytest.mark.parametrize(
    ("gradient", "engine", "place"),
    [
        ("exact", None, "norm"),
        ("exact", None, "head"),
        # A head that goes by the place of a token in its row is refused where it sees the kept tokens alone.
        ("kv", "two_pass", "norm"),
        ("detached", "two_pass", "norm"),
    ],
)
def test_positions_of_a_model_that_predict_nothing(gradient, engine, selection, place):
    input_ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[1, 4:] = -100
    silent = torch.cat([labels[:, 1:] == -100, torch.ones(2, 1, dtype=torch.bool)], dim=1)[:, :, None]
    found = []
    for fill in (0.0, torch.nan):
        model = ROUTABLE["llama"]()
        module = model.model.norm if place == "norm" else model.lm_head

        def put(module, args, output, fill=fill):
            return output.masked_fill(silent, fill) if output.shape[:2] == silent.shape[:2] else output

        module.register_forward_hook(put)
        wrapped = CGGRModel(model, gradient=gradient, engine=engine, selection=selection).train()
        loss = wrapped(input_ids, labels=labels, draw=1)
        loss.backward()
        metrics = {name: value for name, value in wrapped.metrics.items() if isinstance(value, torch.Tensor)}
        found.append({"loss": loss.detach(), **gradients(model), **metrics})
    wanted, dirty = found
    assert wanted["loss"] > 0.0 and wanted.keys() == dirty.keys()
    assert all(torch.equal(wanted[name], dirty[name]) for name in wanted)
