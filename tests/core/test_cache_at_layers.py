"""Where a pass gives its cache: to the model by the name that it takes it by, or to each layer."""

import pytest
import torch
from torch import nn

from cggr_core.routing import context_pass
from cggr_core.routing.architectures import describe
from cggr_core.routing.engine import Engine
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE


class Layer(nn.Module):
    def forward(self, hidden_states, mask=None, past_key_values=None, **kwargs):
        return hidden_states


class Older(nn.Module):
    def forward(self, hidden_states, layer_past=None):
        return hidden_states


class Inheriting(Older):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


CACHE, HIDDEN = object(), torch.zeros(1)


@pytest.mark.parametrize(
    ("layer", "args", "wanted_args", "wanted_kwargs"),
    [
        (Layer(), (HIDDEN,), (HIDDEN,), {"past_key_values": CACHE}),
        (Layer(), (HIDDEN, 1), (HIDDEN, 1), {"past_key_values": CACHE}),
        (Layer(), (HIDDEN, 1, None), (HIDDEN, 1, CACHE), {}),
        (Older(), (HIDDEN,), (HIDDEN,), {"layer_past": CACHE}),
        (Older(), (HIDDEN, None), (HIDDEN, CACHE), {}),
        (Inheriting(), (HIDDEN,), (HIDDEN,), {"layer_past": CACHE}),
        (Inheriting(), (HIDDEN, None), (HIDDEN, CACHE), {}),
        (Wrapper(Layer()), (HIDDEN,), (HIDDEN,), {"past_key_values": CACHE}),
        (nn.Identity(), (HIDDEN, 1), (HIDDEN, 1), {}),
    ],
)
def test_a_layers_arguments_with_the_cache(layer, args, wanted_args, wanted_kwargs):
    found = context_pass.with_cache(layer, args, {"scale": 2}, CACHE)
    assert found == (wanted_args, {"scale": 2, **wanted_kwargs})


@pytest.mark.parametrize("own_code", [False, True])
def test_who_is_given_the_cache(own_code):
    model, given = ROUTABLE["llama"](), []
    if own_code:
        model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
    engine = Engine(model)
    inputs = engine.inputs(input_ids=tokens(2, 8))
    engine.prepare(inputs, routing=True)
    assert engine.architecture.cache_at_layers is own_code
    given.clear()
    context, _ = engine.context(inputs, depth=engine.depth, keep_graph=False, head=False)
    assert sorted(context.recorded) == [0, 1, 2] and context.hidden is None and context.depth == 3
    assert all(call["use_cache"] is False and "past_key_values" not in call for call in given)
    assert len(given) == own_code
    some, _ = engine.context(inputs, depth=1, keep_graph=False, head=False)
    assert sorted(some.recorded) == [0] and some.hidden.shape == (2, 8, 32)


def test_the_name_by_which_a_model_takes_its_cache():
    class Own(type(ROUTABLE["llama"]())):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Named(type(ROUTABLE["llama"]())):
        def forward(self, input_ids=None, labels=None, cache=None):
            return super().forward(input_ids=input_ids, labels=labels, past_key_values=cache)

    class Silent(type(ROUTABLE["llama"]())):
        def forward(self, input_ids=None, labels=None):
            return super().forward(input_ids=input_ids, labels=labels)

    names = []
    for kind in (None, Own, Named, Silent):
        model = ROUTABLE["llama"]()
        own = describe(model).cache_name
        if kind is not None:
            model.__class__ = kind
        names.append(describe(model).cache_name)
    assert names == [own, own, "cache", own]
