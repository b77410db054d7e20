"""Error messages of CGGRModel."""

import pytest
import torch
from torch import nn

from cggr_core import CGGRModel, Selection
from tests.support.model_steps import backward, tokens
from tests.support.tiny_models import ROUTABLE, VOCAB


class TestBadInput:
    def test_the_name_of_a_model_is_not_a_model(self):
        with pytest.raises(TypeError, match=r"got str; load it first: AutoModelForCausalLM\.from_pretrained\('gpt2'\)"):
            CGGRModel("gpt2")

    def test_a_batch_is_unpacked(self):
        with pytest.raises(
            TypeError, match=r"input_ids must be a tensor, got dict; unpack a batch: model\(\*\*batch\)"
        ):
            CGGRModel(ROUTABLE["llama"]())({"input_ids": torch.ones(1, 4, dtype=torch.int64)})

    def test_a_router_is_not_named(self):
        with pytest.raises(TypeError, match=r"got 'truncated' of type str; create_truncated_router\(model\) makes one"):
            CGGRModel(ROUTABLE["llama"](), router="truncated")

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
            (
                {"threshold_sensitivity": 1.0},
                "threshold_sensitivity=1.0 has an effect only with dynamic_threshold",
            ),
            ({"gradient": "sequence", "block_size": 4}, "block_size=4 selects blocks of tokens"),
            ({"gradient": "sequence", "selection": "sequence_aware"}, "drops whole sequences; use selection='topk'"),
            ({"gradient": "exact", "engine": "two_pass"}, "engine='two_pass' applies to gradient='kv'"),
            ({"gradient": "sequence", "engine": "interleaved"}, "engine='interleaved' applies to gradient='kv'"),
            ({"selection": "supervised", "block_size": 2}, "block_size=2 would change which tokens are kept"),
            ({"selection": "supervised", "warmup_steps": 5}, "warmup_steps=5 would change which tokens are kept"),
            ({"selection": "supervised", "router": nn.Identity()}, "uses no score; leave router=None"),
            ({"seed": -1}, "seed must be at least 0"),
            ({"min_tokens_ratio": float("nan")}, r"min_tokens_ratio must be in \(0, 1\], got nan"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            CGGRModel(ROUTABLE["llama"](), **settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"unbiased": "no"}, "unbiased must be True or False, got 'no' of type str"),
            ({"dynamic_threshold": 1}, "dynamic_threshold must be True or False, got 1 of type int"),
            ({"ignore_index": None}, "ignore_index must be an integer, got None"),
            ({"seed": 1.5}, "seed must be an integer, got 1.5"),
            ({"min_tokens_ratio": "0.25"}, "min_tokens_ratio must be a number"),
        ],
    )
    def test_settings_of_another_type(self, settings, message):
        with pytest.raises(TypeError, match=message):
            CGGRModel(ROUTABLE["llama"](), **settings)

    def test_a_router_that_cannot_be_called(self):
        with pytest.raises(
            TypeError,
            match=r"must be callable or have the methods of cggr_core\.step\.Router, got 3 of type int",
        ):
            CGGRModel(ROUTABLE["llama"](), 3)

    @pytest.mark.parametrize(
        ("given", "value"),
        [
            *(
                (name, torch.ones(3, 12))
                for name in ("token_weight", "reference_nll", "num_items", "selection", "draw")
            ),
            ("first_row", 3),
            ("example_ids", torch.arange(3)),
        ],
    )
    def test_what_only_training_reads(self, given, value):
        wrapped, input_ids = CGGRModel(ROUTABLE["llama"]()), tokens()
        with pytest.raises(ValueError, match=f"{given}: used only in training with labels, and labels is None"):
            wrapped(input_ids, **{given: value})
        with pytest.raises(ValueError, match=f"{given}: used only in training with labels, and this is eval"):
            wrapped.eval()(input_ids, labels=input_ids, **{given: value})

    def test_a_reference_that_random_selections_would_not_read(self):
        wrapped, input_ids = CGGRModel(ROUTABLE["llama"](), selection="random"), tokens()
        with pytest.raises(ValueError, match="reference_nll is used only by scoring='excess'"):
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
            ({"attention_mask": torch.ones(3, 12, 11)}, ValueError, "attention_mask must have shape"),
            ({"position_ids": torch.arange(11)[None]}, ValueError, "position_ids must have shape"),
            ({"token_weight": torch.ones(3)}, ValueError, "token_weight must have shape"),
            ({"reference_nll": torch.ones(3, 12)}, ValueError, "used only by scoring='excess'"),
            ({"input_ids": torch.zeros(12, dtype=torch.long)}, ValueError, r"input_ids must be \[B, S\] with at least"),
            ({"input_ids": torch.zeros(3, 0, dtype=torch.long)}, ValueError, r"at least one token, got shape \[3, 0\]"),
            ({"input_ids": torch.zeros(3, 12)}, TypeError, "input_ids must hold integers, got dtype torch.float32"),
            ({"input_ids": torch.zeros(3, 12, dtype=torch.uint8)}, TypeError, "torch.int32, got torch.uint8"),
            (
                {"input_ids": torch.full((3, 12), VOCAB)},
                ValueError,
                rf"36 value.s. outside the model's {VOCAB}",
            ),
            ({"input_ids": torch.arange(36).view(3, 12) - 1}, ValueError, r"1 value.s. outside .*first is -1"),
            ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a tensor, got list"),
            ({"inputs_embeds": torch.zeros(3, 12, 32)}, ValueError, "exactly one of input_ids and inputs_embeds"),
            ({"attention_mask": [[1] * 12] * 3}, TypeError, "attention_mask must be a tensor, got list"),
            ({"attention_mask": torch.ones(3, 12, device="meta")}, ValueError, "attention_mask is on meta"),
            ({"position_ids": torch.arange(12.0)[None]}, TypeError, "position_ids must hold integers"),
            ({"token_weight": torch.ones(3, 12).long()}, TypeError, "token_weight must have a floating dtype"),
            ({"num_items": 0}, ValueError, "num_items must be above 0, got 0"),
            ({"num_items": torch.tensor(0)}, ValueError, "num_items must be above 0, got 0"),
            ({"num_items": torch.ones(2)}, ValueError, r"num_items must be one number, got a tensor of shape \[2\]"),
            ({"num_items": "12"}, TypeError, "num_items must be a number above 0, got '12'"),
            ({"draw": 1.5}, TypeError, "draw must be an integer, got 1.5"),
            ({"draw": torch.tensor(1.0)}, TypeError, "draw must be an integer or a 0-dim int64 tensor"),
            ({"first_row": -1}, ValueError, "first_row must be at least 0"),
            (
                {"selection": torch.ones(3, 12, dtype=torch.bool)},
                TypeError,
                "selection must be a Selection, got Tensor",
            ),
            ({"use_cache": True}, ValueError, "use_cache=True: a training forward with labels returns only the loss"),
            ({"logits_to_keep": 4}, ValueError, "logits_to_keep=4: a training forward"),
            ({"past_key_values": object()}, ValueError, "past_key_values=object: a training forward"),
        ],
    )
    @pytest.mark.parametrize("gradient", ["kv", "sequence"])
    def test_inputs(self, inputs, error, message, gradient):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, gradient=gradient)
        before = wrapped.routing_state_dict()
        with pytest.raises(error, match=message):
            wrapped(**{"input_ids": input_ids, "labels": input_ids, **inputs})
        assert all(parameter.grad is None for parameter in model.parameters())
        assert wrapped.routing_state_dict() == before

    @pytest.mark.parametrize("gradient", ["exact", "kv", "sequence"])
    def test_an_id_that_the_first_look_does_not_meet(self, gradient):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, gradient=gradient)
        wrapped(input_ids, labels=input_ids)
        wrong = input_ids.clone()
        wrong[2, -1] = VOCAB + 3
        with pytest.raises(ValueError, match=f"first is {VOCAB + 3}"):
            wrapped(wrong, labels=input_ids)

    @pytest.mark.parametrize("before", [0, 1])
    @pytest.mark.parametrize("gradient", ["exact", "kv"])
    def test_transforms_of_torch_func(self, gradient, before):
        model, input_ids = ROUTABLE["llama"](), tokens()
        wrapped = CGGRModel(model, gradient=gradient)
        for _ in range(before):
            wrapped(input_ids, labels=input_ids)
        values = {name: parameter.detach() for name, parameter in wrapped.named_parameters()}

        def loss(parameters):
            return torch.func.functional_call(wrapped, parameters, (input_ids,), {"labels": input_ids})

        for run in (
            lambda: torch.func.grad(loss)(values),
            lambda: torch.func.vmap(lambda row: wrapped(row[None], labels=row[None]))(input_ids),
        ):
            with pytest.raises(RuntimeError, match=r"inside a transform of torch\.func"):
                run()
        assert loss(values).isfinite()  # a call with other parameters is none

    def test_what_asks_for_nothing_changes_nothing(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        nothing = {"use_cache": False, "output_attentions": False, "return_dict": True, "past_key_values": None}
        wrapped = CGGRModel(model)
        plain = wrapped(input_ids, labels=input_ids, draw=0)
        assert wrapped(input_ids, labels=input_ids, draw=0, **nothing).equal(plain)

    def test_a_model_that_is_nan_from_the_start(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        model.model.norm.weight.data[0] = float("nan")
        with pytest.raises(ValueError, match="logits are NaN at 16 of the first 16 positions"):
            CGGRModel(model)(input_ids, labels=input_ids)

    def test_a_nan_weight_of_a_kept_token(self):
        input_ids = tokens()
        with pytest.raises(ValueError, match=r"the loss is NaN: .* or a token_weight is NaN"):
            CGGRModel(ROUTABLE["llama"]())(
                input_ids, labels=input_ids, token_weight=torch.full(input_ids.shape, torch.nan)
            )

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
        with pytest.raises(ValueError, match="the loss is NaN: logits are NaN or infinite"):
            wrapped(input_ids, labels=input_ids)

    def test_a_selection_for_another_batch(self):
        model, input_ids = ROUTABLE["llama"](), tokens()
        selection = Selection.from_mask(torch.ones(2, 12, dtype=torch.bool), capacity=4)
        with pytest.raises(ValueError, match="selection was made for"):
            CGGRModel(model)(input_ids, labels=input_ids, selection=selection)


def test_a_model_that_is_wrapped_already_is_refused():
    wrapped = CGGRModel(ROUTABLE["llama"]())
    with pytest.raises(TypeError, match="model is already a CGGRModel"):
        CGGRModel(wrapped)


def test_layers_that_the_config_counts_otherwise_are_said_by_number():
    model = ROUTABLE["llama"]()
    model.model.layers = model.model.layers[:2]
    input_ids = torch.arange(12)[None] + 3
    wrapped = CGGRModel(model, gradient="kv").train()
    with pytest.raises(ValueError, match=r"it has no ModuleList of length config\.num_hidden_layers=3"):
        wrapped(input_ids, labels=input_ids)
    model.config.num_hidden_layers = 2
    assert wrapped(input_ids, labels=input_ids).isfinite()
