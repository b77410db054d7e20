"""What CGGRModel says when it is misused."""

import pytest
import torch
from torch import nn

from cggr_core import CGGRModel, Selection
from model_steps import backward, tokens
from tiny_models import ROUTABLE, VOCAB


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"gradient": "kw"}, "did you mean 'kv'"),
            ({"selection": "stratfied"}, "did you mean 'stratified'"),
            ({"scoring": "entropi"}, "did you mean 'entropy'"),
            ({"engine": "two-pass"}, "did you mean 'two_pass'"),
            ({"min_tokens_ratio": 0.0}, r"min_tokens_ratio must be in \(0, 1\]"),
            ({"min_tokens_ratio": 1.5}, r"min_tokens_ratio must be in \(0, 1\]"),
            ({"engine": "interleaved"}, "needs the selection before the layers"),
            ({"gradient": "sequence", "selection": "supervised"}, "keeps whole sequences"),
            ({"dynamic_threshold": True, "selection": "random"}, "scores none"),
            ({"threshold_sensitivity": 1.0}, "threshold_sensitivity=1.0 is read with dynamic_threshold=True only"),
            ({"gradient": "sequence", "block_size": 4}, "block_size=4 selects blocks of tokens"),
            ({"gradient": "sequence", "selection": "sequence_aware"}, "leaves sequences out; use selection='topk'"),
            ({"gradient": "exact", "engine": "two_pass"}, "engine='two_pass' says how gradient='kv'"),
            ({"gradient": "sequence", "engine": "interleaved"}, "engine='interleaved' says how gradient='kv'"),
            ({"selection": "supervised", "block_size": 2}, "block_size=2 would change which tokens are kept"),
            ({"selection": "supervised", "warmup_steps": 5}, "warmup_steps=5 would change which tokens are kept"),
            ({"selection": "supervised", "router": nn.Identity()}, "reads no score; leave router=None"),
            ({"seed": -1}, "seed must be at least 0"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            CGGRModel(ROUTABLE["llama"](), **settings)

    def test_a_router_that_cannot_be_called(self):
        with pytest.raises(TypeError, match="router must be callable, a LearnedRouter or RememberedScores, got int"):
            CGGRModel(ROUTABLE["llama"](), 3)

    @pytest.mark.parametrize("given", ["token_weight", "reference_nll", "num_items", "selection", "draw"])
    def test_what_only_training_reads(self, given):
        wrapped, input_ids = CGGRModel(ROUTABLE["llama"]()), tokens()
        with pytest.raises(ValueError, match=f"{given}: read in training with labels only, and labels is None"):
            wrapped(input_ids, **{given: torch.ones(3, 12)})
        with pytest.raises(ValueError, match=f"{given}: read in training with labels only, and this is eval"):
            wrapped.eval()(input_ids, labels=input_ids, **{given: torch.ones(3, 12)})

    def test_a_reference_that_random_selections_would_not_read(self):
        wrapped, input_ids = CGGRModel(ROUTABLE["llama"](), selection="random"), tokens()
        with pytest.raises(ValueError, match="reference_nll is read by scoring='excess' only"):
            wrapped(input_ids, labels=input_ids, reference_nll=torch.ones(3, 12))

    def test_not_a_hugging_face_model(self):
        with pytest.raises(TypeError, match="Hugging Face"):
            CGGRModel(nn.Linear(2, 2))

    @pytest.mark.parametrize(
        ("inputs", "error", "message"),
        [
            ({"labels": torch.zeros(3, 11, dtype=torch.long)}, ValueError, "labels must have shape"),
            ({"labels": torch.zeros(3, 12)}, TypeError, r"labels must be torch.int64, got torch.float32"),
            ({"labels": torch.full((3, 12), VOCAB)}, ValueError, "labels holds 33 value.s. outside the vocabulary"),
            ({"labels": torch.zeros(3, 12, dtype=torch.long, device="meta")}, ValueError, "labels is on meta"),
            ({"attention_mask": torch.ones(3, 11)}, ValueError, "attention_mask must have shape"),
            ({"attention_mask": torch.ones(3, 12, 12)}, ValueError, "attention_mask must be"),
            ({"position_ids": torch.arange(11)[None]}, ValueError, "position_ids must have shape"),
            ({"token_weight": torch.ones(3)}, ValueError, "token_weight must have shape"),
            ({"reference_nll": torch.ones(3, 12)}, ValueError, "scoring='excess' only"),
        ],
    )
    def test_inputs(self, inputs, error, message):
        model, input_ids = ROUTABLE["llama"](), tokens()
        with pytest.raises(error, match=message):
            CGGRModel(model)(input_ids, **{"labels": input_ids, **inputs})
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_nan_logits_are_counted(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model)
        backward(wrapped, input_ids)
        model.model.norm.weight.data[0] = float("nan")
        with pytest.raises(ValueError, match=r"NaN.* at 33"):
            wrapped(input_ids, labels=input_ids)

    @pytest.mark.parametrize("settings", [{"selection": "random"}, {"min_tokens_ratio": 1.0}])
    def test_a_nan_loss_is_named_where_nothing_is_scored(self, settings):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, **settings)
        backward(wrapped, input_ids)
        model.model.norm.weight.data[0] = float("nan")
        wrapped(input_ids, labels=input_ids)
        with pytest.raises(ValueError, match="the last loss was NaN"):
            wrapped(input_ids, labels=input_ids)

    def test_a_selection_for_another_batch(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        selection = Selection.from_mask(torch.ones(2, 12, dtype=torch.bool), capacity=4)
        with pytest.raises(ValueError, match="selection was made for"):
            CGGRModel(model)(input_ids, labels=input_ids, selection=selection)
