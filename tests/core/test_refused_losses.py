"""A model's own loss is cross-entropy whatever rows and labels it is given, or the model is refused."""

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from cggr_core import CGGRModel
from tests.support.own_losses import batch, counted, mean, model_with, nll
from tests.support.tiny_models import ROUTABLE


def per_row(logits, labels, row):
    """A factor for every row that depends on its number of labels."""
    factor = row(counted(labels).sum(1, keepdim=True)).float() * counted(labels)
    return (nll(logits, labels) * factor).sum() / factor.sum().clamp(min=1e-9)


def of_length(logits, labels, change):
    return mean(logits, labels) * change(labels.shape[1])


def weighted(logits, labels, weight):
    weight = weight(torch.arange(labels.shape[1] - 1.0)) * counted(labels)
    return (nll(logits, labels) * weight).sum() / weight.sum()


def hardest(logits, labels, share):
    """The worst-predicted labels, if there are many."""
    losses = nll(logits, labels)[counted(labels)]
    return losses.topk(max(16, int(share * len(losses))) if len(losses) > 16 else len(losses)).values.mean()


def alternated(logits, labels):
    """Another reduction for batches of several rows."""
    return mean(logits, labels) if len(labels) < 3 else nll(logits, labels).sum(1).div(labels.shape[1]).mean()


def square_root(logits, labels):
    rows = counted(labels).sum(1)
    return (nll(logits, labels).sum(1) / rows.clamp(min=1).sqrt()).sum() / rows.sqrt().sum()


# What a look at 16 tokens agrees with, by what it depends on.
OTHERS = {
    "none below 20 labels": lambda logits, labels: (
        per_row(logits, labels, lambda count: count >= 20) if labels.shape[1] > 8 else mean(logits, labels)
    ),
    "none below 20 labels of the batch": lambda logits, labels: (
        mean(logits, labels) * (counted(labels).sum() >= 20 or labels.shape[1] <= 8)
    ),
    "none above 40 labels": lambda logits, labels: per_row(logits, labels, lambda count: count <= 40),
    "half above 100 labels of the batch": lambda logits, labels: (
        mean(logits, labels) * (0.5 if counted(labels).sum() > 100 else 1.0)
    ),
    "rows are averaged if there are many": lambda logits, labels: (
        torch.stack(
            [
                mean(logits[row : row + 1], labels[row : row + 1])
                for row in range(len(labels))
                if counted(labels)[row].any()
            ]
        ).mean()
        if len(labels) > 2
        else mean(logits, labels)
    ),
    "long rows count less": lambda logits, labels: of_length(logits, labels, lambda length: min(1.0, 32 / length)),
    "curriculum by length": lambda logits, labels: of_length(logits, labels, lambda length: float(length <= 40)),
    "late tokens count more": lambda logits, labels: weighted(logits, labels, lambda place: 1.0 + (place > 16)),
    "early tokens do not count": lambda logits, labels: weighted(
        logits, labels, lambda place: (place > 12).float() if len(place) > 16 else torch.ones_like(place)
    ),
    "a window of labels": lambda logits, labels: weighted(logits, labels, lambda place: (place < 32).float()),
    "a cap on the loss": lambda logits, labels: mean(logits, labels).clamp(max=60.0),
    "a cap on a token's loss": lambda logits, labels: (
        (nll(logits, labels).clamp(max=90.0) * counted(labels)).sum() / counted(labels).sum()
    ),
    "a floor of the loss": lambda logits, labels: (mean(logits, labels) - 0.2).abs() + 0.2,
    "nothing for what is predicted well": lambda logits, labels: (
        (nll(logits, labels) * (nll(logits, labels) > 0.3)).sum() / counted(labels).sum()
    ),
    "the hardest labels": lambda logits, labels: hardest(logits, labels, 0.5),
    "another reduction for large batches": alternated,
    "divided by a square root": lambda logits, labels: (
        square_root(logits, labels) if labels.shape[1] > 8 else mean(logits, labels)
    ),
    "divided by the tokens, not the labels": lambda logits, labels: (
        nll(logits, labels).sum() / (labels.numel() - len(labels)) if labels.shape[1] > 8 else mean(logits, labels)
    ),
    "twice where few tokens have labels": lambda logits, labels: (
        mean(logits, labels) * (2.0 if counted(labels).float().mean() < 0.05 else 1.0)
    ),
    "nothing for a single label": lambda logits, labels: mean(logits, labels) * (counted(labels).sum() > 1),
    "a floor of the count": lambda logits, labels: (
        nll(logits, labels).sum() / counted(labels).sum().clamp(min=16 if len(labels) > 2 else 1)
    ),
    "half below a tenth of the labels": lambda logits, labels: (
        mean(logits, labels) * (0.5 if 1 < counted(labels).sum() < labels.numel() / 10 else 1.0)
    ),
    "another one where gradients are enabled": lambda logits, labels: (
        mean(logits, labels) * (1.1 if torch.is_grad_enabled() else 1.0)
    ),
    "another one where the logits need gradients": lambda logits, labels: (
        mean(logits, labels) * (1.1 if logits.requires_grad and len(labels) > 2 else 1.0)
    ),
    "the first row alone": lambda logits, labels: mean(logits[:2], labels[:2]),
    "a term for many rows": lambda logits, labels: mean(logits, labels) + 0.01 * max(0, len(labels) - 2),
    "a term for the spread of rows": lambda logits, labels: (
        mean(logits, labels) + (0.1 * nll(logits, labels).mean(1).std() if len(labels) > 2 else 0.0)
    ),
}
SAME = {
    "written out": lambda logits, labels: (
        (logits[:, :-1].logsumexp(-1) - logits[:, :-1].gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0])
        .masked_fill(~counted(labels), 0)
        .sum()
        / counted(labels).sum()
    ),
    "row by row": lambda logits, labels: (
        sum(nll(logits[row : row + 1], labels[row : row + 1]).sum() for row in range(len(labels)))
        / counted(labels).sum()
    ),
    "labelled tokens alone": lambda logits, labels: cross_entropy(
        logits[:, :-1][counted(labels)], labels[:, 1:][counted(labels)]
    ),
}


@pytest.mark.parametrize("kind", ["forward", "loss_function"])
@pytest.mark.parametrize("name", OTHERS)
def test_another_loss_is_refused_on_the_first_batch(name, kind):
    model = model_with(OTHERS[name], kind=kind)
    with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
        CGGRModel(model, gradient="exact")(batch(), labels=batch())


@pytest.mark.parametrize("kind", ["forward", "loss_function"])
@pytest.mark.parametrize("name", SAME)
def test_the_same_loss_in_other_words_is_trained(name, kind):
    model, labels = model_with(SAME[name], kind=kind), batch()
    labels[0] = labels[1, :30] = -100
    own = model(input_ids=batch(), labels=labels).loss
    found = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0)(batch(), labels=labels)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)


class WithParts(transformers.LlamaForCausalLM):
    """A loss with a part that starts neutral."""

    def __init__(self, config):
        super().__init__(config)
        self.log_variance = torch.nn.Parameter(torch.zeros(()))

    def forward(self, input_ids=None, labels=None, **options):
        output = super().forward(input_ids=input_ids, labels=labels, **options)
        if labels is not None:
            output.loss = output.loss * (-self.log_variance).exp() + self.log_variance
        return output


@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_a_loss_with_parameters_of_its_own_is_refused_though_they_start_neutral(gradient):
    model = WithParts(ROUTABLE["llama"]().config).train()
    with pytest.raises(ValueError, match=r"own loss trains parameters besides those of its logits \(log_variance\)"):
        CGGRModel(model, gradient=gradient)(batch(), labels=batch())
    model.log_variance.requires_grad_(False)
    CGGRModel(model, gradient=gradient)(batch(), labels=batch())
    with torch.no_grad():
        model.log_variance.fill_(0.5)
    with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
        CGGRModel(model, gradient=gradient)(batch(), labels=batch())


def test_the_cause_is_said_where_gradients_make_the_difference():
    other = OTHERS["another one where gradients are enabled"]
    with pytest.raises(ValueError, match="with gradients enabled; without, it is cross-entropy"):
        CGGRModel(model_with(other), gradient="exact")(batch(), labels=batch())


class GradientInPlace(torch.autograd.Function):
    """Like fused losses, writes the gradient over the logits."""

    @staticmethod
    def forward(ctx, logits, labels):
        with torch.enable_grad():
            given = logits.detach().clone().requires_grad_()
            loss = mean(given, labels)
            gradient = torch.autograd.grad(loss, given)[0]
        if ctx.needs_input_grad[0]:
            ctx.mark_dirty(logits)
            logits.copy_(gradient)
        ctx.gradient = gradient
        return logits, loss.detach()

    @staticmethod
    def backward(ctx, _, grad):
        return ctx.gradient * grad, None


def test_a_loss_that_writes_its_gradient_into_the_logits_is_trained():
    model = model_with(lambda logits, labels: GradientInPlace.apply(logits, labels)[1])
    own = model(input_ids=batch(), labels=batch()).loss
    found = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0)(batch(), labels=batch())
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)
