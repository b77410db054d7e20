"""Checks of a model's own loss agree whatever the dtype, the number of labels and the arguments of the loss."""

import pytest
import torch
import transformers

from cggr_core import CGGRModel
from tests.support.own_losses import batch, counted, nll
from tests.support.tiny_models import ROUTABLE, VOCAB


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
