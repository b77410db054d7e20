"""The schedule, the state and the metrics of a CGGRModel."""

import warnings

import pytest
import torch
from torch import nn

from cggr_core import CGGRModel, create_truncated_router
from tests.support.model_steps import backward, tokens
from tests.support.tiny_models import ROUTABLE


class TestScheduleAndState:
    def test_starts_at_its_ratio_without_any_step(self):
        model, input_ids = ROUTABLE["llama"](), tokens(length=33)
        router = create_truncated_router(model, 1)
        wrapped = CGGRModel(model, router=router, min_tokens_ratio=0.25)
        backward(wrapped, input_ids)
        assert wrapped.metrics["keep_ratio"] == 0.25
        assert wrapped.metrics["kept_tokens"] == 24

    def test_warms_up_from_everything(self):
        model, input_ids = ROUTABLE["llama"](), tokens(length=33)
        wrapped = CGGRModel(model, min_tokens_ratio=0.25, warmup_steps=2)
        ratios = []
        for _ in range(4):
            backward(wrapped, input_ids)
            ratios.append(round(wrapped.metrics["keep_ratio"].item(), 3))
            wrapped.step()
        assert ratios == [1.0, 0.625, 0.25, 0.25]

    def test_says_once_that_step_is_never_called(self):
        model, input_ids = ROUTABLE["llama"](), tokens(1, 3)
        wrapped = CGGRModel(model, warmup_steps=10, gradient="exact")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(120):
                wrapped(input_ids, labels=input_ids)
        assert len([w for w in caught if "step()" in str(w.message)]) == 1

    def test_a_resumed_run_makes_the_same_selections(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        whole = CGGRModel(model, selection="sampled", seed=5, warmup_steps=6)
        losses = []
        for step in range(6):
            losses.append(backward(whole, input_ids)[0])
            whole.step()
            if step == 2:
                state = whole.routing_state_dict()
        resumed = CGGRModel(model, selection="sampled", seed=5, warmup_steps=6)
        resumed.load_routing_state_dict(state)
        for step in range(3, 6):
            assert torch.equal(backward(resumed, input_ids)[0], losses[step])
            resumed.step()
        assert len({loss.item() for loss in losses}) == 6

    def test_a_resumed_run_has_the_same_dynamic_ratio(self):
        model, input_ids = ROUTABLE["llama"](), tokens(length=65)
        whole = CGGRModel(model, dynamic_threshold=True, threshold_sensitivity=1.0)
        backward(whole, input_ids)
        state = whole.routing_state_dict()
        resumed = CGGRModel(model, dynamic_threshold=True, threshold_sensitivity=1.0)
        resumed.load_routing_state_dict(state)
        assert torch.equal(backward(whole, input_ids)[0], backward(resumed, input_ids)[0])
        assert whole.schedule.ratio == resumed.schedule.ratio != 0.25

    def test_dynamic_ratio_follows_the_confidence_of_the_step_before(self):
        model, input_ids = ROUTABLE["llama"](), tokens(length=65)
        wrapped = CGGRModel(model, dynamic_threshold=True, threshold_sensitivity=1.0)
        backward(wrapped, input_ids)
        assert wrapped.metrics["keep_ratio"] == 0.25
        confidence = wrapped.metrics["confidence"].item()
        backward(wrapped, input_ids)
        assert confidence < 0.5
        assert wrapped.metrics["keep_ratio"] > 0.25


class TestMetrics:
    def test_what_was_done_is_reported(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, selection="topk", scoring="loss", min_tokens_ratio=0.3)
        loss, _ = backward(wrapped, input_ids)
        metrics = wrapped.metrics
        assert metrics["engine"] == "two_pass"
        assert metrics["gradient"] == "kv"
        assert metrics["countable_tokens"] == 33
        assert metrics["kept_tokens"] == 9
        torch.testing.assert_close(metrics["loss"], loss)
        torch.testing.assert_close(metrics["score_kept"], loss)  # top-k of the loss, unweighted: the same mean
        # All scores together are the full loss's terms: tokens without a label have no part in either mean.
        sums = 9 * metrics["score_kept"] + (33 - 9) * metrics["score_dropped"]
        torch.testing.assert_close(sums, 33 * metrics["full_loss"])
        torch.testing.assert_close(
            metrics["full_loss"], model(input_ids=input_ids, labels=input_ids).loss.detach(), rtol=1e-5, atol=0
        )

    @pytest.mark.parametrize(
        ("settings", "with_router", "engine"),
        [
            ({}, False, "two_pass"),
            ({}, True, "interleaved"),
            ({"selection": "random"}, False, "interleaved"),
            ({"selection": "supervised"}, False, "interleaved"),
            ({"selection": "random", "engine": "two_pass"}, False, "two_pass"),
            ({"engine": "two_pass"}, True, "two_pass"),
            ({"gradient": "exact"}, False, "plain"),
            ({"gradient": "sequence"}, True, "plain"),
        ],
    )
    def test_the_engine_is_what_the_scores_need(self, settings, with_router, engine):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, create_truncated_router(model, 1) if with_router else None, **settings)
        backward(wrapped, input_ids)
        assert wrapped.metrics["engine"] == engine

    def test_a_router_may_be_any_model(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        router = ROUTABLE["gpt2"]().eval()
        wrapped = CGGRModel(model, router, selection="topk", scoring="loss", min_tokens_ratio=0.2)
        backward(wrapped, input_ids)
        logits = router(input_ids).logits[:, :-1]
        nll = nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
        torch.testing.assert_close(wrapped.metrics["score_kept"], nll.topk(2).values.mean().detach())
        assert wrapped.metrics["engine"] == "interleaved"
        assert "router.transformer.wte.weight" in dict(wrapped.named_parameters())
        assert all(parameter.grad is None for parameter in router.parameters())

    @pytest.mark.parametrize("gradient", ["exact", "kv", "detached", "sequence"])
    def test_where_everything_is_kept_nothing_is_scored(self, gradient, monkeypatch):
        looks = []
        monkeypatch.setattr("cggr_core.readout.linear_token_statistics", lambda *args, **more: looks.append(args))
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, create_truncated_router(model, 1), gradient=gradient, warmup_steps=2)
        backward(wrapped, input_ids)
        assert wrapped.metrics["keep_ratio"] == 1
        assert not looks and "score_kept" not in wrapped.metrics
