"""A model's own loss is cross-entropy whatever rows and labels it is given, or the model is refused."""

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from cggr_core import CGGRModel
from cggr_core.routing import batch_loss
from tests.support.tiny_models import ROUTABLE, VOCAB


def batch(rows=4, length=48):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def nll(logits, labels, **options):
    """Of every label ``[B, S - 1]``, 0 where nothing counts."""
    return cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none", **options)


def counted(labels):
    return labels[:, 1:] != -100


def mean(logits, labels):
    return nll(logits, labels).sum() / counted(labels).sum()


def per_row(logits, labels, row):
    """Of every row a factor that depends on its number of labels."""
    factor = row(counted(labels).sum(1, keepdim=True)).float() * counted(labels)
    return (nll(logits, labels) * factor).sum() / factor.sum().clamp(min=1e-9)


def of_length(logits, labels, change):
    return mean(logits, labels) * change(labels.shape[1])


def weighted(logits, labels, weight):
    weight = weight(torch.arange(labels.shape[1] - 1.0)) * counted(labels)
    return (nll(logits, labels) * weight).sum() / weight.sum()


def hardest(logits, labels, share):
    """Of all labels those that are predicted worst, if there are many."""
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


def model_with(own, *, kind="forward"):
    class OwnLoss(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, attention_mask=None, **options):
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
            if labels is not None:
                output.loss = own(output.logits, labels)
            return output

    made = ROUTABLE["llama"]()
    if kind == "forward":
        other = OwnLoss(made.config)
        other.load_state_dict(made.state_dict())
        return other.train()
    made.loss_function = lambda logits, labels, vocab_size, **options: own(
        logits.view(*labels.shape, vocab_size), labels
    )
    return made


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


# Where the look cannot be had without the layers or over fewer classes.
def with_weight_of_classes(logits, labels):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight=torch.ones(VOCAB))


def test_a_model_that_does_not_run_over_fewer_classes_is_run_as_it_is(monkeypatch):
    monkeypatch.setattr(batch_loss, "_MOST_CLASSES", 16)
    CGGRModel(model_with(with_weight_of_classes), gradient="exact")(batch(), labels=batch())

    def short(logits, labels):
        return with_weight_of_classes(logits, labels) * (len(labels) > 1)

    with pytest.raises(ValueError, match=r"own loss is not .*: with few labels in one row, predicted well it is 0"):
        CGGRModel(model_with(short), gradient="exact")(batch(), labels=batch())


def test_which_tokens_the_labels_are_is_looked_at_over_the_whole_vocabulary(monkeypatch):
    monkeypatch.setattr(batch_loss, "_MOST_CLASSES", 16)
    rare = int(batch()[3, -1])
    assert rare not in batch()[:2, :8]

    def own(logits, labels):
        weight = torch.ones(logits.shape[-1])
        weight[rare % logits.shape[-1]] = 5.0 if logits.shape[-1] == VOCAB else 1.0
        return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), weight=weight)

    with pytest.raises(ValueError, match="with the tokens that the batch's labels are it is"):
        CGGRModel(model_with(own), gradient="exact")(batch(), labels=batch())


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached", "sequence"])
@pytest.mark.parametrize(("rows", "length"), [(2, 40), (6, 16)], ids=["longer", "more"])
def test_a_larger_batch_is_looked_at_again(gradient, rows, length):
    def own(logits, labels):
        return mean(logits, labels) * (1.0 if labels.shape[1] <= 16 and len(labels) <= 2 else 0.5)

    wrapped = CGGRModel(model_with(own), gradient=gradient)
    for _ in range(2):
        wrapped(batch(2, 16), labels=batch(2, 16))
    with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
        wrapped(batch(rows, length), labels=batch(rows, length))


@pytest.mark.parametrize("where", ["model", "config", "part", "loss"])
def test_a_setting_of_the_loss_that_changes_later_is_seen(where):
    class Part(torch.nn.Module):
        factor = 0

        def forward(self, value):
            return value * (1.0 + self.factor)

    class Loss:
        def __init__(self):
            self.factor = 0.0

        def __call__(self, logits, labels, vocab_size, **options):
            return mean(logits, labels) * (1.0 + self.factor)

    class OwnLoss(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.part = Part()

        def forward(self, input_ids=None, labels=None, **options):
            output = super().forward(input_ids=input_ids, labels=labels, **options)
            if labels is not None:
                factor = getattr(self, "factor", 0.0) + getattr(self.config, "factor", 0.0)
                output.loss = self.part(output.loss) * (1.0 + factor)
            return output

    model = OwnLoss(ROUTABLE["llama"]().config).train()
    model.loss_function = Loss()
    wrapped = CGGRModel(model, gradient="exact")
    wrapped(batch(), labels=batch())
    holder = {"model": model, "config": model.config, "part": model.part, "loss": model.loss_function}[where]
    holder.factor = 0.1
    with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
        wrapped(batch(), labels=batch())


def test_of_a_setting_that_changes_in_every_step_not_every_change_is_looked_at(monkeypatch):
    looks = []
    own = batch_loss.check_loss_of_batch
    monkeypatch.setattr("cggr_core.routing.engine.check_loss_of_batch", lambda *given: looks.append(own(*given)))
    model = ROUTABLE["llama"]()
    wrapped = CGGRModel(model, gradient="exact")
    for step in range(40):
        model.steps_done = step
        wrapped(batch(2, 8), labels=batch(2, 8))
    assert len(looks) == 10  # the first eight, 16 and 32


def test_what_the_model_would_feed_to_its_loss_alone_is_not_lost():
    class Weighted(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, importance=None, **options):
            output = super().forward(input_ids=input_ids, **options)
            if labels is not None:
                importance = torch.ones_like(labels) if importance is None else importance
                weight = importance[:, 1:] * counted(labels)
                output.loss = (nll(output.logits, labels) * weight).sum() / weight.sum()
            return output

    model = Weighted(ROUTABLE["llama"]().config).train()
    wrapped, importance = CGGRModel(model, gradient="exact"), torch.rand(batch().shape)
    wrapped(batch(), labels=batch())
    with pytest.raises(ValueError, match=r"own loss is not .*: with the batch's labels it is"):
        wrapped(batch(), labels=batch(), importance=importance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "cohere", "bert-masked", "mixtral"])
def test_looks_in_half_precision_agree(name, dtype):
    model, labels = ROUTABLE[name]().to(dtype), batch()
    labels[0] = labels[1, 5:] = -100
    mask = torch.ones_like(labels)
    mask[2, 30:] = 0
    for given in ({}, {"attention_mask": mask}):
        CGGRModel(model, gradient="exact")(batch(), labels=labels, **given)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float16):
        CGGRModel(model, gradient="exact")(batch(), labels=labels)


def test_a_look_runs_no_layer_and_leaves_no_gradient():
    model, calls = ROUTABLE["llama"](), []
    wrapped = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0)
    wrapped(batch(2, 16), labels=batch(2, 16))
    model.model.layers[0].mlp.register_forward_hook(lambda *given: calls.append(given[2].shape[:2]))
    wrapped(batch(2, 16), labels=batch(2, 16))  # a hook is looked at on its own
    calls.clear()
    wrapped(batch(4, 48), labels=batch(4, 48)).backward()
    assert calls == [(4, 48)]
    assert torch.equal(*(torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, plainly(model))))


def plainly(model):
    other = transformers.LlamaForCausalLM(model.config).train()
    other.load_state_dict(model.state_dict())
    wrapped = CGGRModel(other, gradient="exact", min_tokens_ratio=1.0)
    wrapped(batch(4, 48), labels=batch(4, 48)).backward()
    return other


@pytest.mark.parametrize("labels", ["none", "one", "ignored", "outside"])
def test_labels_that_say_little_are_looked_at_without_harm(labels):
    input_ids, options = batch(), {}
    given = torch.full_like(input_ids, -100)
    if labels == "one":
        given[1, 4] = 7
    elif labels == "ignored":
        given, options = input_ids.clone(), {"ignore_index": 5}
        given[0] = 5
    elif labels == "outside":
        given = input_ids.clone()
        given[0, 3] = VOCAB
    wrapped = CGGRModel(ROUTABLE["llama"](), gradient="exact", **options)
    if labels == "outside":
        with pytest.raises(ValueError, match="labels"):
            wrapped(input_ids, labels=given)
    else:
        assert wrapped(input_ids, labels=given).isfinite()


@pytest.mark.parametrize("name", ["llama", "bert-masked"])
def test_a_loss_that_is_no_sum_divided_by_num_items_is_refused_with_it(name):
    model = ROUTABLE[name]()

    def own(logits, labels, vocab_size, **options):
        if options.get("num_items_in_batch") is not None:
            logits = logits * 1.1
        loss = model_loss(logits, labels, vocab_size, **options)
        return loss

    model_loss = model.loss_function
    if name == "llama":
        model.loss_function = own
    wrapped = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0)
    found = wrapped(batch(), labels=batch(), num_items=100)
    count = counted(batch()).sum() if name == "llama" else batch().numel()
    torch.testing.assert_close(found, model(input_ids=batch(), labels=batch()).loss * count / 100)
    with pytest.raises(ValueError, match=r"num_items_in_batch: the loss of .* pass num_items instead"):
        wrapped(batch(), labels=batch(), num_items_in_batch=100)
