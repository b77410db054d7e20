"""How a model aligns its labels, as seen on a few tokens, and the errors for losses that are not cross-entropy."""

import pytest

from cggr_core.routing.architectures import describe
from cggr_core.routing.engine import Engine
from cggr_core.routing.loss_agreement import Alignment, own_alignment
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE


def seen(forward, *, length=8, name="llama"):
    """What is seen of a model with another forward: the model's own is handed to it first."""
    model = ROUTABLE[name]()
    inputs = Engine(model).inputs(input_ids=tokens(length=length)[:2])
    own = model.forward
    model.forward = forward(own, model)
    return own_alignment(model, describe(model), inputs)


def changed(change):
    """By the output alone, of a forward that takes labels by name and nothing more than it is given."""

    def made(own, model):
        def forward(input_ids, attention_mask=None, labels=None, use_cache=None):
            output = own(input_ids=input_ids, attention_mask=attention_mask, labels=labels, use_cache=use_cache)
            change(output)
            return output

        return forward

    return made


def scaled(output):
    output.loss = output.loss * 1.01


@pytest.mark.parametrize(("name", "shifted"), [("llama", True), ("bert-masked", False)])
def test_the_alignment_that_a_model_has(name, shifted):
    assert seen(lambda own, model: own, name=name) == Alignment(shifted, counts_padding=True)
    assert seen(changed(lambda output: None), name=name) == Alignment(shifted, counts_padding=True)
    with pytest.raises(ValueError, match="own loss is not the mean cross-entropy of its logits"):
        seen(lambda own, model: lambda input_ids, labels=None, **rest: own(input_ids, labels=labels.flip(1), **rest))


@pytest.mark.parametrize("length", [2, 3, 8])
def test_another_loss_is_refused_on_rows_that_predict_a_token(length):
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM's own loss is not the mean cross-entropy of its logits"):
        seen(changed(scaled), length=length)
    assert seen(changed(scaled), length=1) is None


def test_a_model_without_a_loss():
    def never(input_ids, attention_mask=None):
        raise AssertionError("called")

    assert seen(lambda own, model: never) is None
    # One that may take labels among its other arguments, and one that says it does.
    assert seen(lambda own, model: lambda input_ids, **rest: own(input_ids, logits_to_keep=0)) is None
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM returns no loss for labels alone"):
        seen(changed(lambda output: setattr(output, "loss", None)))


def test_losses_that_are_no_number_or_cannot_be_computed():
    with pytest.raises(ValueError, match=r"returns a loss of shape \[2\], but a routed step needs a single number"):
        seen(changed(lambda output: setattr(output, "loss", output.loss.repeat(2))))

    def raising(output):
        raise RuntimeError("not here")

    with pytest.raises(ValueError, match=r"with labels for a few tokens, .*: RuntimeError: not here"):
        seen(changed(raising))


@pytest.mark.parametrize("given", [None, "some"])
@pytest.mark.parametrize("where", ["training", "labels"])
def test_logits_that_a_loss_is_made_without(given, where):
    """In training, or wherever there are labels: then they are those of a forward without labels, in evaluation."""
    modes = []

    def made(own, model):
        def forward(input_ids, labels=None, **rest):
            modes.append((model.training, labels is not None))
            output = own(input_ids=input_ids, labels=labels, **rest)
            if model.training or (where == "labels" and labels is not None):
                output.logits = None if given is None else output.logits[:, :3]
            return output

        return forward

    assert seen(made) == Alignment(shifted=True, counts_padding=True)
    calls = [(True, True), (False, True), (False, True), (False, False)]
    assert modes == (calls[:2] if where == "training" else calls)
