"""Each temporary change to a model has the stated scope, and is undone whatever happens."""

import dataclasses
import functools
import types
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cggr_core.routing import patches
from cggr_core.routing.architectures import describe
from cggr_core.routing.truncation import truncated
from tests.support.tiny_models import ROUTABLE, VOCAB


class StopError(Exception):
    """Ends a block early."""


@contextmanager
def left_by_an_error():
    with pytest.raises(StopError):
        yield
        raise StopError


def test_forwards():
    kept, replaced, nested = (nn.Linear(2, 2) for _ in range(3))
    own = nested.forward = types.MethodType(lambda self, x: x + 1, nested)
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    plain, seen = replaced(x), []
    replaced.register_forward_hook(lambda *_: seen.append(1))
    with left_by_an_error(), patches.replaced_forwards({replaced: lambda x: 2 * x, nested: lambda x: 3 * x}):
        assert replaced(x).equal(2 * x) and nested(x).equal(3 * x) and seen == [1]
        with patches.replaced_forwards({replaced: lambda x: 5 * x}):
            assert replaced(x).equal(5 * x)
        assert replaced(x).equal(2 * x)
    assert replaced(x).equal(plain) and "forward" not in replaced.__dict__
    assert nested.__dict__["forward"] is own
    assert "forward" not in kept.__dict__


def test_gathered_weights():
    groups = [types.SimpleNamespace(post_forward_mesh_info=chosen) for chosen in ("mesh", None, "other")]
    with left_by_an_error(), patches.left_gathered(iter(groups)):
        assert [group.post_forward_mesh_info for group in groups] == [None, None, None]
    assert [group.post_forward_mesh_info for group in groups] == ["mesh", None, "other"]


def test_parameters_shared_ones_too():
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2, bias=False), "third": nn.Linear(2, 2)})
    model["second"].weight = model["first"].weight
    own, bias = model["first"].weight, model["first"].bias
    other = nn.Parameter(torch.randn(2, 2, generator=torch.Generator().manual_seed(0)))
    with left_by_an_error(), patches.replaced_parameters(model, {own: other}):
        assert model["first"].weight is other and model["second"].weight is other
        assert model["first"].bias is bias and model["third"].weight is not other
    assert model["first"].weight is own and model["second"].weight is own
    assert model["second"].bias is None


def hooked(seen: list[str]) -> nn.Linear:
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    return module


def test_parameters_of_an_earlier_call():
    module = nn.Linear(2, 3)
    own, earlier = module._parameters, {"weight": nn.Parameter(torch.randn(3, 2)), "bias": None}
    with left_by_an_error(), patches.own_parameters(module, earlier):
        assert module._parameters is earlier and module.weight is earlier["weight"] and module.bias is None
    assert module._parameters is own and module.weight is own["weight"]


def holding(**values):
    module = nn.Module()
    module.config = types.SimpleNamespace(**values)
    return module


def test_a_smaller_vocabulary_is_said_wherever_a_whole_one_is():
    inner = types.SimpleNamespace(vocab_size=9)
    outer, plain = holding(vocab_size=9, get_text_config=lambda: inner), holding(my_vocab_size=9, hidden_size=9)
    plain.vocab_size, plain.padded_vocab_size, plain.old_vocab_size = 9, 9.0, 8
    with left_by_an_error(), patches.smaller_vocabulary([outer, plain], 9, 4):
        assert outer.config.vocab_size == inner.vocab_size == plain.config.my_vocab_size == plain.vocab_size == 4
        assert plain.config.hidden_size == 9 and plain.old_vocab_size == 8
        assert plain.padded_vocab_size == 9 and isinstance(plain.padded_vocab_size, float)
    assert outer.config.vocab_size == inner.vocab_size == plain.config.my_vocab_size == plain.vocab_size == 9


def test_random_states_that_are_not_gone_back_to():
    torchs = functools.partial(checkpoint, use_reentrant=False)
    others = {
        "reentrant": functools.partial(checkpoint, use_reentrant=True),
        "unsaid": functools.partial(checkpoint),
        "another": functools.partial(print, use_reentrant=False),
        "plain": checkpoint,
    }
    modules = {name: nn.Module() for name in ("torchs", "off", *others)}
    for name, module in modules.items():
        module.gradient_checkpointing = name != "off"
        module._gradient_checkpointing_func = others.get(name, torchs)
        assert patches.recomputes_with_torch(module) is (name not in others)
    assert patches.recomputes_with_torch(nn.Module()) is False
    with left_by_an_error(), patches.without_random_states(types.SimpleNamespace(checkpointing=modules.values())):
        for name, module in modules.items():
            if name == "torchs":
                changed = module._gradient_checkpointing_func
                assert changed.func is checkpoint
                assert changed.keywords == {"use_reentrant": False, "preserve_rng_state": False}
            else:
                assert module._gradient_checkpointing_func is others.get(name, torchs)
    assert modules["torchs"]._gradient_checkpointing_func is torchs


def test_what_forwards_leave_behind():
    """Buffers are put back, and with one that was put in the place of another what its module remembers of it."""
    module: Any = nn.Module()
    module.longest, module.rates, module.beside, module._calls = 8, [1.0], nn.Linear(1, 1), 0
    counting: Any = nn.BatchNorm1d(2)
    counting.steps = 1
    with torch.inference_mode():
        made_for_inference = torch.zeros(2)
    buffers = {"counted": torch.zeros(2), "replaced": torch.zeros(2), "none": None, "of_inference": made_for_inference}
    for name, buffer in {**buffers, "elsewhere": torch.zeros(2, device="meta")}.items():
        module.register_buffer(name, buffer)
    state, other = torch.get_rng_state(), torch.ones(2)
    with left_by_an_error(), patches.nothing_left(nn.Sequential(module, counting), torch.device("cpu")):
        buffers["counted"] += 1
        buffers["replaced"] += 1
        with torch.inference_mode():
            made_for_inference += 1
        module.replaced = other
        module.longest, module.rates, module.none = torch.tensor(40), [2.0], other
        module.growth = module._calls = counting.steps = 5
        counting.running_mean += 1
        module.register_buffer("later", other)
        torch.randn(3)
        assert not torch.equal(torch.get_rng_state(), state)
    assert module.counted is buffers["counted"] and module.of_inference is made_for_inference
    assert buffers["counted"].tolist() == made_for_inference.tolist() == [0, 0]
    assert module.replaced is buffers["replaced"] and module.replaced.tolist() == [0, 0] and module.none is None
    assert (module.longest, module.rates) == (8, [1.0]) and module.later is other
    assert not hasattr(module, "growth") and module._calls == 5
    assert counting.steps == 5 and not counting.running_mean.any(), "none of its buffers was replaced"
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_that_are_off():
    seen: list[str] = []
    module, x = hooked(seen), torch.ones(1, 2)
    with left_by_an_error(), patches.without_hooks(module):
        module(x)
        assert seen == []
    module(x)
    assert seen == ["before", "after"]


def test_a_call_that_is_another():
    seen: list[str] = []
    module, x = hooked(seen), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    wanted = module(x)
    seen.clear()

    def run(given, *, scale):
        seen.append("inside")
        return scale * module(given) + module(given)

    with left_by_an_error(), patches.forward_replaced_by(module, run):
        torch.testing.assert_close(module(x, scale=2), 3 * wanted)
        assert seen == ["before", "inside", "after"]
    assert module(x).equal(wanted)


@pytest.mark.parametrize("inside", [True, False])
def test_checkpointing_that_is_off(inside):
    model = ROUTABLE["llama"]()
    first, second = model.model.layers[:2]
    first.gradient_checkpointing = True
    second.gradient_checkpointing = inside
    architecture = describe(model)
    model.train()
    assert patches.uses_checkpointing(first) and patches.uses_checkpointing(second) is inside
    with left_by_an_error(), patches.without_checkpointing(architecture):
        assert not any(patches.uses_checkpointing(layer) for layer in model.model.layers)
    assert first.gradient_checkpointing is True and second.gradient_checkpointing is inside
    assert not patches.uses_checkpointing(first.eval())
    assert not patches.uses_checkpointing(nn.Linear(2, 2))


def test_attention_implementations_of_every_config():
    configs = [types.SimpleNamespace(_attn_implementation=name) for name in ("sdpa", "eager")]
    for config in configs:
        config._attn_implementation_internal = config._attn_implementation
    modules = [types.SimpleNamespace(config=config) for config in (*configs, configs[0], types.SimpleNamespace())]
    architecture = dataclasses.replace(describe(ROUTABLE["llama"]()), configured=tuple(modules))
    with left_by_an_error(), patches.attention_implementation(architecture, {"sdpa": "one", "eager": "two"}.get):
        assert [config._attn_implementation_internal for config in configs] == ["one", "two"]
    assert [config._attn_implementation_internal for config in configs] == ["sdpa", "eager"]
    assert vars(modules[-1].config) == {}


class Noisy(nn.Module):
    """Every kind of rate, and attributes that only look like one."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.channels = nn.Dropout2d(0.2)
        self.attention_dropout = 0.3
        self.router_jitter_noise = 0.4
        self.dropped_layers = 2
        self.p = 0.5
        self.none_dropout = 0.0
        self.eps = 1e-6


def test_noise_that_is_off():
    model = Noisy()
    before = {**vars(model)}
    with left_by_an_error(), patches.without_dropout(model):
        assert (model.drop.p, model.channels.p, model.attention_dropout, model.router_jitter_noise) == (0, 0, 0, 0)
        assert (model.dropped_layers, model.p, model.eps) == (2, 0.5, 1e-6)
    assert (model.drop.p, model.channels.p) == (0.1, 0.2)
    assert vars(model) == before


class Sharded(Tensor):
    """A stand-in for tensors whose values are stored elsewhere."""


def test_grown_parameters():
    model = nn.Module()
    values = {"zeros": torch.zeros(64, 256), "small": torch.full((512,), 0.05), "ones": torch.ones(4)}
    values |= {"one": torch.zeros(1), "some": torch.tensor([0.0, 0.0, 1.0]), "below": torch.full((3, 64), -0.05)}
    values |= {"two": torch.zeros(2), "kernels": torch.zeros(64, 4, 256)}
    for name, value in values.items():
        model.register_parameter(name, nn.Parameter(value.clone()))
    model.register_parameter("whole", nn.Parameter(torch.zeros(4, dtype=torch.int64), requires_grad=False))
    model.register_parameter("sharded", nn.Parameter(torch.zeros(4).as_subclass(Sharded)))
    model.register_parameter("meta", nn.Parameter(torch.zeros(4, device="meta")))
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    with left_by_an_error(), patches.grown_parameters(model) as grown:
        assert grown is True
        # Of variance 1 / columns where there are any, else 1.
        assert 0.9 < model.zeros.std() * 16 < 1.1 and 0.9 < model.small.std() < 1.1 and model.below.std() > 0.05
        assert 0.9 < model.kernels.std() * 16 < 1.1 and model.two.all()
        for name in ("ones", "one", "some"):
            assert model.get_parameter(name).equal(values[name])
        assert not model.whole.any() and not model.sharded.any()
        first = model.zeros.detach().clone()
    for name, value in values.items():
        assert model.get_parameter(name).equal(value)
    assert versions == {name: parameter._version for name, parameter in model.named_parameters()}
    assert torch.get_rng_state().equal(state)
    with patches.grown_parameters(model):
        assert model.zeros.equal(first), "the same numbers each time"


def test_nothing_to_grow():
    model = nn.Linear(3, 3)
    before = model.weight.detach().clone()
    with patches.grown_parameters(model) as grown:
        assert grown is False
        assert model.weight.equal(before)


def test_evaluation_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))).train()
    model[1].training = False  # but what it holds trains
    flags = [module.training for module in model.modules()]
    with left_by_an_error(), patches.evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == flags


def test_layers_that_are_left_out():
    model = ROUTABLE["llama"]().eval()
    input_ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model.lm_head(model.model.norm(model(input_ids, output_hidden_states=True).hidden_states[1]))
        whole = model(input_ids).logits
        with left_by_an_error(), truncated(describe(model), 1, lambda hidden: hidden):
            torch.testing.assert_close(model(input_ids).logits, wanted)
        assert model(input_ids).logits.equal(whole)
