"""Arguments that nothing in a model reads are refused by name; those that something reads pass, wherever it is."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cggr_core import CGGRModel, routed_logprobs
from cggr_core.routing.unread import check_read
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE


@pytest.mark.parametrize("gradient", ["kv", "detached", "exact", "sequence"])
def test_an_argument_that_nothing_reads(gradient):
    model, ids = CGGRModel(ROUTABLE["llama"](), gradient=gradient, selection="random").train(), tokens()
    with pytest.raises(ValueError, match=r"foo: nothing in LlamaForCausalLM reads .* leave it out"):
        model(input_ids=ids, labels=ids, foo=3)
    with pytest.raises(ValueError, match=r"attn_mask: .*did you mean attention_mask"):
        model(input_ids=ids, labels=ids, attn_mask=torch.ones_like(ids))
    model(input_ids=ids, labels=ids, use_cache=False).backward()  # what is refused leaves nothing behind


def test_routed_logprobs_refuses_it_too():
    model, ids = ROUTABLE["llama"](), tokens()
    with pytest.raises(ValueError, match=r"position_idx: .*did you mean position_ids"):
        routed_logprobs(model, ids, keep=torch.ones_like(ids, dtype=torch.bool), position_idx=ids)


@pytest.mark.parametrize("architecture", sorted(ROUTABLE))
def test_what_transformers_takes_everywhere_is_read(architecture):
    model = ROUTABLE[architecture]()
    check_read(model, ["use_cache", "return_dict", "output_router_logits", "seq_idx", "is_causal", "cache_position"])
    with pytest.raises(ValueError, match="foo"):
        check_read(model, ["foo"])


def test_it_may_be_read_by_a_layer_a_hook_or_the_attention_function():
    model = ROUTABLE["llama"]()
    kind = type(model.model.layers[0].self_attn)

    class Own(kind):
        def forward(self, *args, **kwargs):
            kwargs.pop("of_a_layer", None)
            return super().forward(*args, **kwargs)

    model.model.layers[0].self_attn.__class__ = Own
    check_read(model, ["of_a_layer"])
    ALL_ATTENTION_FUNCTIONS["own"] = lambda *args, of_attention=None, **kwargs: None
    try:
        model.config._attn_implementation = "own"
        check_read(model, ["of_attention"])
    finally:
        del ALL_ATTENTION_FUNCTIONS._local_mapping["own"]
    with pytest.raises(ValueError, match="of_a_hook"):
        check_read(model, ["of_a_hook"])
    model.model.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    check_read(model, ["of_a_hook"])
