"""Arguments that nothing in a model reads are refused by name; those that something reads pass, wherever it is."""

from functools import partial, wraps
from types import SimpleNamespace
from typing import TypedDict

import pytest
import torch
from torch import nn
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


class Bare(nn.Module):
    """A model whose forward mentions nothing."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def forward(self, **kwargs):
        return kwargs


def test_an_argument_that_is_given_as_none_is_not_given():
    model, ids = CGGRModel(ROUTABLE["llama"](), selection="random").train(), tokens()
    model(input_ids=ids, labels=ids, foo=None).backward()


def refused(*names, model=None):
    """The arguments that are refused, as the error names them; none if it says nothing."""
    try:
        check_read(Bare() if model is None else model, names)
    except ValueError as error:
        return str(error).partition(":")[0]
    return ""


TAKEN = """adapter_names alora_offsets attention_mask cache cache_position input_ids inputs_embeds logits_to_keep
past_key_values position_ids return_dict token_type_ids use_cache"""


def test_what_every_forward_takes_may_be_given_to_a_model_that_mentions_none_of_it():
    assert [name for name in TAKEN.split() if refused(name)] == []
    assert refused("zebra", "use_cache", "apple") == "apple, zebra"


def test_who_may_have_been_meant():
    with pytest.raises(ValueError, match=r"in Bare reads .*; did you mean logits_to_keep\? Else leave it out$"):
        check_read(Bare(), ["logit_to_keep"])
    with pytest.raises(ValueError, match=r"would be ignored; leave it out$"):
        check_read(Bare(), ["zebra"])

    class Own(Bare):
        def forward(self, stripes=None, **kwargs):
            return kwargs

    with pytest.raises(ValueError, match=r"in Own reads .*; did you mean stripes"):
        check_read(Own(), ["stripe", "zebra"])


@pytest.mark.parametrize(
    ("module", "counts"),
    [
        ("torch.nn.own", False),
        ("transformers.modeling_utils", False),
        ("transformers.generation.utils", False),
        ("transformers.utils.generic", False),
        ("peft.peft_model", False),
        ("transformers.models.llama", True),
        ("own", True),
    ],
)
def test_methods_of_libraries_read_arguments_of_other_calls(module, counts):
    base = type("Base", (nn.Module,), {"__module__": module, "generate": lambda self, zebra=None: None, "size": 3})
    model = Bare()
    model.part = type("Part", (base,), {})()
    assert refused("zebra", model=model) == ("" if counts else "zebra")


class Typed(TypedDict, total=False):
    of_a_type: int


class Several:
    """Stands for Unpack[...]."""

    __args__ = (Typed,)


def plain(self, first, *, keyword=None):
    local = first
    return local, lambda given: given.pop("of_a_lambda")


def typed(self, **kwargs: Several):
    return kwargs


@wraps(plain)
def around(self, *args, of_a_wrapper=None, **kwargs):
    return plain(self, *args, **kwargs)


@pytest.mark.parametrize(
    ("method", "names", "others"),
    [
        (plain, ["first", "keyword", "of_a_lambda"], ["local", "given"]),
        (partial(plain, keyword=1), ["first", "keyword", "of_a_lambda"], ["local"]),
        (around, ["of_a_wrapper", "first", "keyword", "of_a_lambda"], ["args", "local"]),
        (typed, ["of_a_type"], ["kwargs"]),
    ],
)
@pytest.mark.parametrize("replaced", [False, True], ids=["method", "forward of a part"])
def test_how_a_function_reads_an_argument(method, names, others, replaced):
    model = Bare()
    if replaced:
        model.part = nn.Identity()
        model.part.forward = method.__get__(model.part) if hasattr(method, "__get__") else method
    else:
        model.part = type("Part", (nn.Module,), {"method": method})()
    assert [name for name in names if refused(name, model=model)] == []
    assert [name for name in others if not refused(name, model=model)] == []
