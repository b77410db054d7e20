"""Edge cases of CGGRModel's batches, and where it behaves as the wrapped model."""

import copy

import pytest
import torch

from cggr_core import CGGRModel, create_truncated_router
from tests.support.model_steps import MODES, ROUTED, backward, checkpoint_activations, routed, tokens
from tests.support.tiny_models import ROUTABLE


class TestEdges:
    @pytest.mark.parametrize("gradient", MODES)
    def test_nothing_countable_is_a_zero_connected_to_the_graph(self, gradient):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, gradient=gradient)
        loss, found = backward(wrapped, input_ids, labels=torch.full_like(input_ids, -100))
        assert loss == 0
        assert all(bool((value == 0).all()) for value in found.values())
        assert wrapped.metrics["kept_tokens"] == 0

    @pytest.mark.parametrize("gradient", MODES)
    @pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 2), (2, 3), (1, 7)])
    def test_few_tokens(self, gradient, rows, length):
        model, input_ids = ROUTABLE["llama"](), tokens(rows, length)
        wrapped = CGGRModel(model, gradient=gradient)
        loss, _ = backward(wrapped, input_ids)
        assert torch.isfinite(loss)
        assert wrapped.metrics["countable_tokens"] == rows * (length - 1)
        kept = wrapped.metrics["kept_tokens"]
        assert kept > 0 if length > 1 else kept == 0

    @pytest.mark.parametrize("gradient", MODES)
    def test_labels_that_do_not_count_are_never_kept(self, gradient):
        model, input_ids = ROUTABLE["llama"](), tokens()
        labels = input_ids.masked_fill(torch.arange(12) % 3 == 0, -100)
        wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0)
        backward(wrapped, input_ids, labels=labels)
        assert wrapped.metrics["kept_tokens"] == wrapped.metrics["countable_tokens"] == (labels[:, 1:] != -100).sum()

    def test_supervised_keeps_exactly_the_labelled_tokens(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        labels = input_ids.clone()
        labels[0, :9] = -100
        labels[1, :5] = -100
        exact = CGGRModel(model, gradient="exact", selection="supervised")
        loss, _ = backward(exact, input_ids, labels=labels)
        plain = model(input_ids=input_ids, labels=labels).loss
        torch.testing.assert_close(loss, plain.detach())
        wrapped = CGGRModel(model, selection="supervised")
        loss, _ = backward(wrapped, input_ids, labels=labels)
        torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=0)
        assert wrapped.metrics["engine"] == "interleaved"
        assert wrapped.metrics["keep_ratio"] == 1

    # Without gradients, "detached" is "kv".
    @pytest.mark.parametrize("gradient", ["exact", "kv", "sequence"])
    def test_the_weighted_loss_estimates_the_full_loss(self, gradient):
        model, input_ids = ROUTABLE["llama"](), tokens(rows=6)
        wrapped = CGGRModel(model, gradient=gradient, selection="sampled", min_tokens_ratio=0.5, scoring="combined")
        with torch.no_grad():
            full = model(input_ids=input_ids, labels=input_ids).loss
            losses = torch.stack([wrapped(input_ids, labels=input_ids) for _ in range(80)])
        standard_error = losses.std() / 80**0.5
        assert (losses.mean() - full).abs() <= 4 * standard_error
        assert standard_error > 0

    def test_user_weights_multiply(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, selection="random", min_tokens_ratio=1.0)
        loss, _ = backward(wrapped, input_ids)
        doubled, _ = backward(wrapped, input_ids, token_weight=torch.full((3, 12), 2.0))
        torch.testing.assert_close(doubled, 2 * loss)
        only_first = torch.zeros(3, 12)
        only_first[0] = 1.0
        loss, _ = backward(wrapped, input_ids, token_weight=only_first)
        torch.testing.assert_close(loss, model(input_ids=input_ids[:1], labels=input_ids[:1]).loss.detach() / 3)


class TestIsTheWrappedModel:
    def test_in_evaluation_without_labels_and_for_saving(self, tmp_path):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model)
        assert wrapped.state_dict().keys() == {f"model.{name}" for name in model.state_dict()}
        assert len(list(wrapped.parameters())) == len(list(model.parameters()))
        torch.testing.assert_close(wrapped(input_ids).logits, model(input_ids).logits)
        wrapped.eval()
        torch.testing.assert_close(
            wrapped(input_ids, labels=input_ids).loss, model(input_ids=input_ids, labels=input_ids).loss
        )
        generated = wrapped.generate(input_ids[:1, :4], max_new_tokens=2, do_sample=False)
        assert generated.shape == (1, 6)
        wrapped.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        torch.testing.assert_close(again(input_ids).logits, model(input_ids).logits)

    def test_a_router_of_the_same_model_adds_no_parameters(self):
        model = ROUTABLE["llama"]()
        wrapped = CGGRModel(model, create_truncated_router(model, 1))
        assert [name for name, _ in wrapped.named_parameters()] == [f"model.{n}" for n, _ in model.named_parameters()]

    def test_nothing_of_the_model_stays_changed(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        checkpoint_activations(model)
        before = {name: dict(module.__dict__) for name, module in model.named_modules()}
        for gradient, engine in ROUTED:
            backward(routed(model, gradient, engine), input_ids)
        for name, module in model.named_modules():
            assert "forward" not in module.__dict__, name
            assert module.training == before[name]["training"]
            assert module.__dict__.get("gradient_checkpointing") == before[name].get("gradient_checkpointing")
        assert model.config._attn_implementation == "sdpa"

    def test_nothing_of_the_model_stays_changed_after_an_error(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = routed(model)
        backward(wrapped, input_ids)

        def fail(*_):
            raise RuntimeError("a layer failed")

        hook = model.model.layers[1].mlp.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="a layer failed"):
            wrapped(input_ids, labels=input_ids)
        hook.remove()
        assert all("forward" not in module.__dict__ for module in model.modules())
        backward(wrapped, input_ids)

    def test_deep_copies(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = routed(model)
        loss, _ = backward(wrapped, input_ids)
        copied = copy.deepcopy(routed(model))
        torch.testing.assert_close(backward(copied, input_ids)[0], loss)
