"""A model's own loss is cross-entropy whatever rows and labels it is given, or the model is refused."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from cggr_core import CGGRModel
from cggr_core.routing import batch_loss
from cggr_core.routing.engine import Engine
from tests.support.tiny_models import ROUTABLE, VOCAB


def batch(rows=4, length=48):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))


def nll(logits, labels, **options):
    """Loss of every label ``[B, S - 1]``, 0 where nothing is counted."""
    return cross_entropy(logits[:, :-1].transpose(1, 2).float(), labels[:, 1:], reduction="none", **options)


def counted(labels):
    return labels[:, 1:] != -100


def mean(logits, labels):
    return nll(logits, labels).sum() / counted(labels).sum()


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


class Schedule:
    """What a loss may ask for its weight."""

    def __init__(self):
        self.extra = 0.0


FACTOR = {"of a module": 0.0}


class StatefulLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(100))
        self.register_buffer("small", torch.zeros(()))
        self.weights, self.table, self.tensor = [0.0, 0.0], {"z": 0.0}, torch.zeros(3)
        self.schedule = Schedule()

    def forward(self, logits, labels):
        factor = self.count.sum() + self.small + sum(self.weights) + self.table["z"] + self.tensor.sum()
        return mean(logits, labels) * (1.0 + factor + self.schedule.extra)


class WithCriterion(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.criterion = StatefulLoss()

    def forward(self, input_ids=None, labels=None, **options):
        output = super().forward(input_ids=input_ids, **options)
        if labels is not None:
            output.loss = self.criterion(output.logits, labels)
        return output


def written(tensor):
    with torch.no_grad():
        tensor.add_(0.1)


CHANGES = {
    "a large buffer is written to": lambda loss: written(loss.count),
    "a small buffer is written to": lambda loss: written(loss.small),
    "a small buffer's data is written to": lambda loss: loss.small.data.add_(0.1),
    "a buffer is replaced": lambda loss: setattr(loss, "count", loss.count + 0.1),
    "a tensor is replaced": lambda loss: setattr(loss, "tensor", torch.ones(3)),
    "a tensor is written to": lambda loss: written(loss.tensor),
    "an item of a list": lambda loss: loss.weights.__setitem__(1, 0.1),
    "an item of a table": lambda loss: loss.table.update(z=0.1),
    "an attribute of an object": lambda loss: setattr(loss.schedule, "extra", 0.1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_loss_reads_that_changes_later_is_seen(name):
    model = WithCriterion(ROUTABLE["llama"]().config).train()
    wrapped = CGGRModel(model, gradient="exact")
    looks = []
    for _ in range(2):
        wrapped(batch(2, 16), labels=batch(2, 16))
        looks.append(wrapped._passes.seen)
    assert looks[0] == looks[1], "nothing changed"
    CHANGES[name](model.criterion)
    with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
        wrapped(batch(2, 16), labels=batch(2, 16))


def closure():
    factor = 0.0

    def own(logits, labels, vocab_size, **options):
        return mean(logits.view(*labels.shape, vocab_size), labels) * (1.0 + factor)

    def change():
        nonlocal factor
        factor = 0.1

    return own, change


def closed_over_tensor():
    factor = torch.zeros(())

    def own(logits, labels, vocab_size, **options):
        return mean(logits.view(*labels.shape, vocab_size), labels) * (1.0 + factor)

    return own, lambda: factor.add_(0.1)


def closed_over_object():
    schedule = Schedule()

    def own(logits, labels, vocab_size, **options):
        return mean(logits.view(*labels.shape, vocab_size), labels) * (1.0 + schedule.extra)

    return own, lambda: setattr(schedule, "extra", 0.1)


def bound():
    def own(logits, labels, vocab_size, factors, **options):
        return mean(logits.view(*labels.shape, vocab_size), labels) * (1.0 + factors[0])

    factors = [0.0]
    return partial(own, factors=factors), lambda: factors.__setitem__(0, 0.1)


def default():
    def own(logits, labels, vocab_size, *, factor=0.0, **options):
        return mean(logits.view(*labels.shape, vocab_size), labels) * (1.0 + factor)

    return own, lambda: own.__kwdefaults__.update(factor=0.1)


def of_a_module():
    def own(logits, labels, vocab_size, **options):
        return mean(logits.view(*labels.shape, vocab_size), labels) * (1.0 + FACTOR["of a module"])

    return own, lambda: FACTOR.update({"of a module": 0.1})


def a_method():
    class Losses:
        factor = 0.0

        def own(self, logits, labels, vocab_size, **options):
            return mean(logits.view(*labels.shape, vocab_size), labels) * (1.0 + self.factor)

    losses = Losses()
    return losses.own, lambda: setattr(losses, "factor", 0.1)


@pytest.mark.parametrize(
    "made", [closure, closed_over_tensor, closed_over_object, bound, default, of_a_module, a_method]
)
def test_what_a_loss_function_reads_that_changes_later_is_seen(made, monkeypatch):
    monkeypatch.setitem(FACTOR, "of a module", 0.0)
    model = ROUTABLE["llama"]()
    model.loss_function, change = made()
    wrapped = CGGRModel(model, gradient="exact")
    wrapped(batch(2, 16), labels=batch(2, 16))
    change()
    with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
        wrapped(batch(2, 16), labels=batch(2, 16))


def test_a_loss_that_changes_unseen_is_seen_where_every_step_is_verified(monkeypatch):
    calls = []

    def own(logits, labels):
        calls.append(None)
        return mean(logits, labels) * (1.0 + float(bool(hidden)))

    hidden = []
    for interval, seen in (("", False), ("2", True)):
        monkeypatch.setenv("CGGR_VERIFY", interval)
        wrapped = CGGRModel(model_with(own), gradient="exact")
        for _ in range(2):
            wrapped(batch(2, 16), labels=batch(2, 16))
        before = len(calls)
        hidden.append([])  # no plain value
        if seen:
            with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
                wrapped(batch(2, 16), labels=batch(2, 16))
        else:
            wrapped(batch(2, 16), labels=batch(2, 16))
            assert len(calls) == before
        hidden.clear()


def test_of_a_setting_that_changes_in_every_step_not_every_change_is_looked_at(monkeypatch):
    looks = []
    own = batch_loss.check_loss_of_batch
    monkeypatch.setattr("cggr_core.routing.findings.check_loss_of_batch", lambda *given: looks.append(own(*given)))
    model = ROUTABLE["llama"]()
    wrapped = CGGRModel(model, gradient="exact")
    with pytest.warns(UserWarning, match="^steps_done of the model.* keeps changing"):
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


ARCHITECTURE = SimpleNamespace(head=SimpleNamespace(classes=VOCAB), configured=(), counts_padding=True, shifted=True)


def given(input_ids=None, **more):
    """A model without special tokens, and a batch for it."""
    model = ROUTABLE["llama"]()
    return model, Engine(model).inputs(input_ids=batch() if input_ids is None else input_ids, **more)


@pytest.fixture
def looked(monkeypatch):
    """Every look without the layers, in turn, with over how many classes it is."""
    seen = []
    monkeypatch.setattr(batch_loss, "_difference", lambda model, arch, look, classes: seen.append((look, classes)))

    def looks(model, inputs, labels, architecture=ARCHITECTURE):
        seen.clear()
        assert batch_loss._without_layers(model, architecture, inputs, labels) is None
        return list(seen)

    return looks


@pytest.mark.parametrize(("rows", "length"), [(4, 48), (1, 48), (3, 2), (2, 5)])
def test_the_rows_and_labels_that_are_looked_at(rows, length, looked):
    labels = batch(rows, length)
    labels[-1, 1] = -100
    model, inputs = given(batch(rows, length))
    as_given, every, uneven, few = looks = [look for look, classes in looked(model, inputs, labels) if classes == VOCAB]
    assert [look.said for look in looks] == [
        "with the batch's labels",
        "with a label at every token",
        "with more labels in some rows than in others",
        "with few labels in one row, predicted well",
    ]
    assert torch.equal(as_given.labels, labels)
    assert "attention_mask" not in as_given.arguments, "the batch is looked at as it is"
    for look in (every, uneven):
        assert torch.equal(look.arguments["input_ids"], batch(rows, length))
        assert torch.equal(look.arguments["attention_mask"], torch.ones(rows, length, dtype=torch.int64))
    assert every.labels.shape == (rows, length) and every.labels.min() >= 0 and every.labels.max() < VOCAB
    assert every.labels.unique().numel() > min(every.labels.numel(), VOCAB) // 3
    counts = (uneven.labels != -100).sum(1)
    assert torch.equal(uneven.labels[uneven.labels != -100], every.labels[uneven.labels != -100])
    if rows > 1:
        assert counts[0] == 0 and counts[-1] == length and (counts.diff() >= 0).all()
        assert (rows, length) != (4, 48) or 0 < counts[1] < counts[2] < length
    else:
        assert length // 4 < counts < length * 3 // 4
    half = max(length // 2, 2)
    assert few.labels.tolist() == [every.labels[0, : min(half, 4)].tolist() + [-100] * (half - 4)]
    assert torch.equal(few.arguments["input_ids"], batch(rows, length)[:1, :half])
    assert few.arguments["attention_mask"].shape == (1, half)
    # The largest logits where every token counts; few labels are predicted well.
    assert every.scale > uneven.scale == as_given.scale > few.scale and few.sure > 5
    assert every.sure == uneven.sure == as_given.sure == 0
    again = [look.labels for look, _ in looked(model, inputs, labels)]
    assert all(map(torch.equal, again, (as_given.labels, every.labels, uneven.labels, few.labels))), "on every rank"


@pytest.mark.parametrize(("rows", "length", "counts"), [(4, 48, [1, 4, 14, 52]), (2, 8, [1, 2, 4, 8])])
def test_looks_from_a_single_label_to_many(rows, length, counts, looked):
    model, inputs = given(batch(rows, length))
    looks = [look for look, _ in looked(model, inputs, batch(rows, length))][-4:]
    assert [look.said for look in looks] == [f"with {count} of the tokens labelled" for count in counts]
    for look, count in zip(looks, counts, strict=True):
        assert int((look.labels != -100).sum()) == int((look.labels[:, 1:] != -100).sum()) == count
        assert torch.equal(look.arguments["input_ids"], batch(rows, length)) and look.labels.max() < 16
    padding = torch.ones(rows, length, dtype=torch.int64)
    padding[:, : length // 2] = 0
    model, inputs = given(batch(rows, length), attention_mask=padding)
    few = [look.labels for look, _ in looked(model, inputs, batch(rows, length))][-4:-1]
    assert all((labels[padding == 0] == -100).all() for labels in few)


def test_what_goes_with_text_is_left_out_and_padding_is_said(looked):
    padding, ids = torch.ones(4, 48, dtype=torch.int64), batch()
    padding[1, :20], ids[2, 5] = 0, 90
    model, inputs = given(ids, attention_mask=padding)
    model.config.image_token_id = 90
    as_given, every, uneven, few, *_ = (look.arguments for look, _ in looked(model, inputs, batch()))
    assert as_given["input_ids"][2, 5] == 90 and torch.equal(as_given["attention_mask"], padding)
    for arguments in (every, uneven):
        assert arguments["input_ids"][2, 5] == 0 and torch.equal(arguments["attention_mask"], padding)
    assert torch.equal(few["attention_mask"], padding[:1, :24])
    embedded = torch.randn(2, 6, 32)
    inputs = Engine(model).inputs(inputs_embeds=embedded)
    for look, _ in looked(model, inputs, batch(2, 6))[1:3]:
        assert set(look.arguments) == {"inputs_embeds", "attention_mask"}
        assert torch.equal(look.arguments["inputs_embeds"], embedded)
    model.forward = lambda input_ids=None, labels=None: None  # which takes no mask
    assert "attention_mask" not in looked(model, inputs, batch(2, 6))[1][0].arguments


@pytest.mark.parametrize(
    ("logits", "most", "classes"), [(4 * 48 * 32, 256, 32), (4 * 48 * 500, 40, 40), (1, 256, 16), (1 << 23, 256, 97)]
)
def test_over_how_many_classes_a_batch_is_looked_at(logits, most, classes, looked, monkeypatch):
    monkeypatch.setattr(batch_loss, "_LOGITS", logits)
    monkeypatch.setattr(batch_loss, "_MOST_CLASSES", most)
    told = []
    monkeypatch.setattr(batch_loss, "smaller_vocabulary", lambda *given: told.append(given) or nullcontext())
    model, inputs = given()
    labels = batch()
    labels[0, :7] = -100
    (first, over), *others = looked(model, inputs, labels)
    others, of_counts = others[:-4], others[-4:]
    assert [over for _, over in of_counts] == [16] * 4 and told.pop() == ((), VOCAB, 16), "many looks are cheap ones"
    if classes == VOCAB:
        assert told == [] and over == VOCAB and len(others) == 3
    else:
        assert told == [((), VOCAB, classes)]
        # Which tokens the labels are, first and over all classes.
        assert over == VOCAB and set(first.labels.flatten().tolist()) == set(labels[labels >= 0].tolist())
        first = others.pop(0)[0]
    assert [over for _, over in others] == [classes] * 3
    assert torch.equal(first.labels, labels.where(labels < 0, labels % classes))
    assert all(look.labels.max() < classes for look, _ in others)


@pytest.mark.parametrize(
    ("logits", "shape"), [(97 * 4 * 48, (4, 48)), (97 * 3 * 48, (3, 48)), (97 * 20, (1, 20)), (5, (1, 2))]
)
def test_which_tokens_the_labels_are_is_looked_at_where_there_is_room(logits, shape, monkeypatch):
    monkeypatch.setattr(batch_loss, "_LOGITS_OF_IDS", logits)
    model, inputs = given()
    labels = batch()
    labels[:, 10:] = -100
    ids = set(labels[labels >= 0].tolist())
    (look,) = batch_loss._of_ids(model, inputs, labels, VOCAB)
    assert look.labels.shape == look.arguments["input_ids"].shape == look.arguments["attention_mask"].shape == shape
    found = look.labels.flatten().tolist()
    assert set(found) == ids if len(found) >= len(ids) else set(found) < ids and len(set(found)) == len(found)
    assert found[: len(ids)] != sorted(found[: len(ids)]) or len(found) < 3, "in no order that means anything"
    (again,) = batch_loss._of_ids(model, inputs, labels, VOCAB)
    assert torch.equal(again.labels, look.labels)
    (none,) = batch_loss._of_ids(model, inputs, labels.fill_(-100), VOCAB)
    assert none.labels.min() >= 0 and none.labels.unique().numel() == min(len(found), VOCAB)


@pytest.mark.parametrize("traced", [False, True])
def test_the_logits_of_a_look(traced):
    head, hidden, labels = torch.nn.Linear(8, 5), torch.randn(1, 40, 8), torch.arange(40)[None] % 5
    labels[0, 3] = -100

    def logits(scale, sure, shifted, given=hidden):
        architecture = SimpleNamespace(head=SimpleNamespace(module=head), shifted=shifted)
        look = batch_loss._Look("", {}, labels, scale, sure)
        with torch.no_grad(), batch_loss._logits_for(architecture, look, 5, traced=traced):
            found = head(given)
        assert found.requires_grad is traced
        return found.detach()

    plain = logits(1.0, 0.0, True)
    assert 0.8 < plain.std() < 1.2
    torch.testing.assert_close(logits(7.0, 0.0, False), 7 * plain)
    added = torch.zeros(1, 40, 5)
    for place, label in enumerate(labels[0].tolist()):
        if label >= 0:
            added[0, place, label] = 3.0
    torch.testing.assert_close(logits(1.0, 3.0, False) - plain, added)
    torch.testing.assert_close(logits(2.0, 3.0, True)[:, :-1] - 2 * plain[:, :-1], added[:, 1:])
    assert torch.equal(logits(2.0, 3.0, True)[:, -1], 2 * plain[:, -1])
    part = hidden[:, :7]  # some apply the head to part of the tokens
    assert torch.equal(logits(1.0, 3.0, True, part), logits(1.0, 0.0, True, part))


@pytest.mark.parametrize(
    ("size", "most", "refused"),
    [((2, 24), 48, False), ((2, 24), 24, False), ((2, 24), 23, True), ((4, 24), 48, True), ((1, 24), 48, False)],
)
def test_a_loss_that_differs_without_layers_alone_is_held_to_whole_rows(size, most, refused, monkeypatch):
    """It is the same loss if the batch itself could be run as it is, every row and every token of it."""
    rows, length = size
    looks = []

    class OfLayers(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, **options):
            output = super().forward(input_ids=input_ids, labels=labels, **options)
            if labels is not None:
                looks.append((self.ran, tuple(labels.shape)))
                output.loss = output.loss * (1.0 if self.ran else 2.0)
            self.ran = False
            return output

    model = OfLayers(ROUTABLE["llama"]().config).train()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: setattr(model, "ran", True))
    model.ran = False
    wrapped, labels = CGGRModel(model, gradient="exact"), batch(rows, length)
    monkeypatch.setattr(batch_loss, "_LOGITS_OF_IDS", min(rows, 2) * VOCAB * most)
    if refused:
        with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
            wrapped(labels, labels=labels)
    else:
        wrapped(labels, labels=labels)
    whole = [shape for ran, shape in looks if ran][1:]  # but for the look at a few tokens
    length, rows = min(length, most), min(rows, 2)
    assert whole == [*[(rows, length)] * 3, (1, length // 2), *[(rows, length)] * 4]


def test_a_loss_that_cannot_be_had_for_the_batch_is_refused():
    def own(logits, labels):
        if labels.shape[1] > 8:
            raise ValueError("too long for me")
        return mean(logits, labels)

    with pytest.raises(ValueError, match=r"OwnLoss raised when called with labels for rows of the batch.*too long"):
        CGGRModel(model_with(own), gradient="exact")(batch(), labels=batch())


@pytest.mark.parametrize("chunk", [24, 48])
def test_rows_that_run_at_the_batchs_length_alone_are_run_at_it(chunk, monkeypatch):
    """Half a row, and a row as short as there is room for, are no rows of such a model."""
    lengths = []

    def own(logits, labels):
        lengths.append(labels.shape[1])
        if labels.shape[1] % chunk and labels.shape[1] > 8:
            raise ValueError("whole chunks alone")
        return with_weight_of_classes(logits, labels)

    monkeypatch.setattr(batch_loss, "_MOST_CLASSES", 16)
    monkeypatch.setattr(batch_loss, "_LOGITS_OF_IDS", 2 * VOCAB * 30)
    CGGRModel(model_with(own), gradient="exact")(batch(), labels=batch())
    assert lengths[-8:] == [48] * 8


@pytest.mark.parametrize("padded", [False, True])
def test_a_loss_that_reads_the_mask_is_looked_at_without_layers(padded):
    class WithoutPadding(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, attention_mask=None, **options):
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
            if labels is not None:
                counts = torch.ones_like(labels) if attention_mask is None else attention_mask
                output.loss = mean(output.logits, labels.masked_fill(counts.view(labels.shape) == 0, -100))
            return output

    model, calls = WithoutPadding(ROUTABLE["llama"]().config).train(), []
    wrapped, mask = CGGRModel(model, gradient="exact", min_tokens_ratio=1.0), torch.ones_like(batch())
    mask[1, 30:] = 0
    options = {"attention_mask": mask} if padded else {}
    wrapped(batch(2, 8), labels=batch(2, 8), **{name: mask[:2, :8] for name in options})
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *given: calls.append(given[2].shape[:2]))
    wrapped(batch(2, 8), labels=batch(2, 8), **{name: mask[:2, :8] for name in options})
    calls.clear()
    found = wrapped(batch(), labels=batch(), **options)
    assert calls == [(4, 48)]
    hook.remove()
    torch.testing.assert_close(found, model(batch(), labels=batch(), **options).loss, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("own", ["no logits", "logits of labels", "another head", "right"])
def test_logits_that_are_not_those_of_all_tokens_are_looked_at_as_they_are(own):
    """Whatever replaces them, a loss that differs for the batch is refused."""

    class Sparse(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, labels=None, attention_mask=None, **options):
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **options)
            if labels is None:
                return output
            factor = 1.0 if own == "right" or (len(labels) < 3 and labels.shape[1] <= 8) else 1.1
            output.loss = mean(output.logits, labels) * factor
            if self.training and own in ("no logits", "right"):
                output.logits = None
            elif own == "logits of labels":
                output.logits = output.logits[:, :-1][counted(labels)]
            elif own == "another head":
                output.logits = output.logits[..., :-1]
            return output

    wrapped = CGGRModel(Sparse(ROUTABLE["llama"]().config).train(), gradient="exact")
    if own == "right":
        wrapped(batch(), labels=batch())
    else:
        with pytest.raises(ValueError, match="own loss is not the mean cross-entropy"):
            wrapped(batch(), labels=batch())
