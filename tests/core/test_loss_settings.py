"""What a model's own loss reads is followed while it changes."""

from functools import partial

import pytest
import torch
import transformers

from cggr_core import CGGRModel
from cggr_core.routing import batch_loss
from tests.support.own_losses import batch, mean, model_with
from tests.support.tiny_models import ROUTABLE


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
