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
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            CGGRModel(ROUTABLE["llama"](), **settings)

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

    def test_a_selection_for_another_batch(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        selection = Selection.from_mask(torch.ones(2, 12, dtype=torch.bool), capacity=4)
        with pytest.raises(ValueError, match="selection was made for"):
            CGGRModel(model)(input_ids, labels=input_ids, selection=selection)
