"""Truncated routers: the model's own first layers, norm and head, without any memory of their own."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cggr_core import create_truncated_router, token_statistics
from cggr_core.difficulty import FIELDS
from cggr_core.routers import router_statistics
from tests.support.tiny_models import ROUTABLE, UNROUTABLE, VOCAB

ALL = {**ROUTABLE, **UNROUTABLE}


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ALL)
def test_shares_every_parameter(name):
    model = ALL[name]()

    class Allocations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Allocations.count += 1
            return func(*args, **(kwargs or {}))

    with Allocations():
        router = create_truncated_router(model, 1)
    assert Allocations.count == 0, "making a router ran or allocated something"
    assert [p.data_ptr() for p in router.parameters()] == [p.data_ptr() for p in model.parameters()]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_equals_the_model_cut_by_hand(name, depth):
    """The layers above hand their input on; everything after them is the model's own."""
    model, input_ids = ALL[name]().eval(), tokens()
    router = create_truncated_router(model, depth)
    layers = router.engine.architecture.layers
    called = []
    hooks = [layer.register_forward_hook(lambda *_, n=n: called.append(n)) for n, layer in enumerate(layers)]

    def skip(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    by_hand = [layer.register_forward_hook(skip, with_kwargs=True) for layer in list(layers)[depth:]]
    expected = model(input_ids=input_ids, use_cache=False).logits
    for hook in by_hand:
        hook.remove()
    torch.testing.assert_close(router(input_ids), expected, rtol=1e-6, atol=1e-6)
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(model(input_ids=input_ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("name", ALL)
def test_statistics_are_those_of_its_logits(name):
    model, input_ids = ALL[name]().eval(), tokens()
    router = create_truncated_router(model, 2)
    targets = input_ids.roll(-1, 1)
    given = {"input_ids": input_ids}
    found = router_statistics(router, given, targets, shape=input_ids.shape, fields=FIELDS)
    expected = token_statistics(router(input_ids), targets)
    for value, wanted in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    assert not router(input_ids).requires_grad


def test_no_layer_above_is_computed():
    model = ROUTABLE["llama"]()
    computed = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, n=number: computed.append(n))
    router = create_truncated_router(model, 1)
    router(tokens())
    computed.clear()
    router(tokens())
    assert computed == [0]


def test_a_model_with_fewer_layers_is_run_in_full():
    model = ROUTABLE["llama"]().eval()
    with pytest.warns(UserWarning, match="runs the full model: it has 3 layers"):
        router = create_truncated_router(model, 4)
    torch.testing.assert_close(router(tokens()), model(tokens()).logits)


def test_a_model_whose_layers_are_not_found_is_run_in_full():
    model = ROUTABLE["llama"]().eval()
    model.model.layers = nn.Sequential(*model.model.layers)
    model.config.num_hidden_layers = 3
    with pytest.warns(UserWarning, match="the layers of LlamaForCausalLM were not found"):
        router = create_truncated_router(model, 1)
    assert router.num_layers == 0
    model.model.layers = nn.ModuleList(model.model.layers)
    torch.testing.assert_close(router(tokens()), model(tokens()).logits)


@pytest.mark.parametrize(
    ("num_layers", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_bad_num_layers(num_layers, error):
    with pytest.raises(error, match="num_layers must be"):
        create_truncated_router(ROUTABLE["llama"](), num_layers)


def test_a_router_that_returns_something_else():
    with pytest.raises(TypeError, match="router must return logits"):
        router_statistics(lambda input_ids: "no", {"input_ids": tokens()}, None, shape=(2, 9), fields=("entropy",))
