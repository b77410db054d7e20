"""A batch in parts (micro-batches, ranks) gives the step of the whole batch; and steps inside the model's own call."""

import pytest
import torch

from cggr_core import CGGRModel
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB


def batch():
    input_ids = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[0, :7] = -100
    labels[2, 5:] = -100
    return input_ids, labels


@pytest.mark.parametrize("selection", ["stratified", "sampled", "random", "topk", "supervised"])
@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
def test_parts_make_the_gradient_of_the_whole(gradient, selection):
    input_ids, labels = batch()
    model = ROUTABLE["llama"]()
    routed = CGGRModel(model, gradient=gradient, selection=selection, seed=5).train()
    whole = routed(input_ids, labels=labels, draw=3)
    whole.backward()
    wanted = gradients(model)
    num_items = (labels[:, 1:] != -100).sum()
    total = torch.zeros(())
    for rows in (slice(0, 1), slice(1, 4)):
        part = routed(input_ids[rows], labels=labels[rows], num_items=num_items, draw=3, first_row=rows.start)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, whole.detach())
    assert relative_error(gradients(model), wanted) <= 1e-6


def test_balancing_losses_count_with_their_share_of_the_tokens():
    input_ids, labels = batch()
    model = ROUTABLE["mixtral"](output_router_logits=True)
    routed = CGGRModel(model, min_tokens_ratio=1.0).train()
    num_items = (labels[:, 1:] != -100).sum()
    rows = [slice(0, 1), slice(1, 4)]
    alone = []
    for part in rows:
        routed(input_ids[part], labels=labels[part])
        alone.append(routed.metrics["auxiliary_loss"])
    for part, whole in zip(rows, alone, strict=True):
        routed(input_ids[part], labels=labels[part], num_items=num_items, first_row=part.start)
        share = (labels[part, 1:] != -100).sum() / num_items
        torch.testing.assert_close(routed.metrics["auxiliary_loss"], whole * share)


class TestInPlace:
    @pytest.mark.parametrize(("gradient", "engine"), [("exact", None), ("kv", "interleaved"), ("kv", "two_pass")])
    def test_hooks_run_once_around_the_step(self, gradient, engine):
        input_ids, labels = batch()
        model = ROUTABLE["llama"]()
        routed = CGGRModel(model, gradient=gradient, engine=engine, selection="random")
        direct = routed.train()(input_ids, labels=labels, draw=0)
        direct.backward()
        wanted = gradients(model)
        calls = []
        model.register_forward_pre_hook(lambda *_: calls.append("before"))
        model.register_forward_hook(lambda *_: calls.append("after"))
        with routed.routed_forward():
            loss = model(input_ids=input_ids, labels=labels, draw=0)
        assert calls == ["before", "after"]
        assert loss.equal(direct)
        loss.backward()
        assert all(grad.equal(wanted[name]) for name, grad in gradients(model).items())

    def test_the_mode_of_the_wrapped_model_counts(self):
        input_ids, labels = batch()
        model = ROUTABLE["llama"]().train()
        routed = CGGRModel(model).eval()
        model.train()
        with routed.routed_forward():
            assert model(input_ids=input_ids, labels=labels).shape == ()
            model.eval()
            assert model(input_ids=input_ids, labels=labels).logits.shape == (4, 12, VOCAB)

    def test_it_is_undone(self):
        model = ROUTABLE["llama"]()
        routed = CGGRModel(model)
        with pytest.raises(RuntimeError, match="inside"), routed.routed_forward():
            raise RuntimeError("inside")
        assert "forward" not in model.__dict__
