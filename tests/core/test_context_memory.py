"""For the backward pass in mode ``kv``, a context token keeps only its layers' inputs, keys and values."""

import gc
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from cggr_core import CGGRModel, Selection
from cggr_core.routing import context_pass, other_tokens, remade
from tests.support.allocations import Held
from tests.support.model_steps import backward, checkpoint_activations, routed, tokens
from tests.support.reference_routing import gradients, reference_loss, relative_error
from tests.support.tiny_models import ROUTABLE

BF16, F32 = torch.bfloat16, torch.float32
ENGINES = ("interleaved", "two_pass")
KEPT = 4


def autocast(on):
    return torch.autocast("cpu", BF16) if on else nullcontext()


def at_the_end(input_ids):
    labels = input_ids.clone()
    labels[:, :-KEPT] = -100
    return labels


def held(name, layers, length, *, dtype, mixed, engine):
    """Bytes that are held after the forward."""
    model = ROUTABLE[name](num_hidden_layers=layers).to(dtype).train()
    wrapped = CGGRModel(model, gradient="kv", selection="supervised", engine=engine)
    input_ids = tokens(2, length)
    with autocast(mixed):
        wrapped(input_ids, labels=at_the_end(input_ids)).backward()
    model.zero_grad(set_to_none=True)
    with Held() as mode, autocast(mixed):
        loss = wrapped(input_ids, labels=at_the_end(input_ids))
        assert loss.requires_grad
        return mode.bytes


def per_token_and_layer(name, **settings):
    """Of the tokens that a batch has more, in the layers that a model has more: nothing else counts."""
    slopes = [held(name, layers, 32, **settings) - held(name, layers, 16, **settings) for layers in (1, 2)]
    return (slopes[1] - slopes[0]) / (2 * (32 - 16))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("name", "dtype", "mixed"),
    [
        ("llama", F32, False),
        ("llama", BF16, False),
        ("llama", F32, True),
        ("gemma", BF16, False),  # its norms are spelled out, and add 1 to their weight
        ("gpt-neox", F32, True),  # torch's own norms
    ],
)
def test_a_context_token_keeps_a_layers_input_its_key_and_its_value(name, dtype, mixed, engine):
    config = ROUTABLE[name]().config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    products = BF16 if mixed else dtype
    floor = config.hidden_size * dtype.itemsize + 2 * heads * head_dim * products.itemsize
    assert per_token_and_layer(name, dtype=dtype, mixed=mixed, engine=engine) == floor


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3", "gpt2", "falcon-rotary", "olmo2"])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_gradients_are_those_of_what_autograd_keeps(name, engine, mixed, monkeypatch):
    def step():
        with autocast(mixed):
            return backward(routed(ROUTABLE[name](), engine=engine, seed=1), tokens())

    loss, found = step()
    for module in (context_pass, other_tokens):
        monkeypatch.setattr(module, "remade_norms", lambda *_: nullcontext())
    wanted_loss, wanted = step()
    assert torch.equal(loss, wanted_loss)
    assert found.keys() == wanted.keys()
    allowed = 2e-2 if mixed else 1e-6
    assert {key: value for key in wanted if (value := distance(found[key], wanted[key])) > allowed} == {}


def distance(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mixed", [False, True])
def test_products_shared_by_two_weights_lose_no_accuracy(engine, mixed, monkeypatch):
    dtype = F32 if mixed else BF16

    def step(dtype, mixed):
        model = ROUTABLE["llama"](num_hidden_layers=1).to(BF16).to(dtype)
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight.normal_(generator=torch.Generator().manual_seed(0))
        with autocast(mixed):
            return backward(routed(model, engine=engine, seed=1), tokens(4, 32))[1]

    truth, shared = step(torch.float64, False), step(dtype, mixed)
    for module in (context_pass, other_tokens):
        monkeypatch.setattr(module, "remade_norms", lambda *_: nullcontext())
    apart = step(dtype, mixed)
    for key in ("input_layernorm.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"):
        key = f"model.layers.0.{key}"
        assert not torch.equal(shared[key], apart[key]), "the products were not shared"
        assert distance(shared[key], truth[key]) < 1.2 * distance(apart[key], truth[key]) + 1e-4, key


def test_projections_that_share_their_products_with_a_norm_may_have_biases_and_be_frozen():
    model = ROUTABLE["llama"](attention_bias=True)
    model.model.layers[0].self_attn.k_proj.requires_grad_(False)
    model.model.layers[1].input_layernorm.requires_grad_(False)
    _, found = backward(routed(model, seed=1), tokens())
    every = ROUTABLE["llama"](attention_bias=True)
    _, wanted = backward(routed(every, seed=1), tokens())
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == len(wanted) - 3
    assert all(distance(found[key], wanted[key]) < 1e-6 for key in trained)


class SparseBeside(torch.nn.Module):
    """A linear layer with a sparse matrix beside its own, as some adapters have."""

    def __init__(self, linear):
        super().__init__()
        self.linear, self.values = linear, torch.nn.Parameter(torch.randn(6))
        self.places = torch.stack([torch.arange(6), torch.arange(6).flip(0)])

    def forward(self, x):
        beside = torch.sparse_coo_tensor(self.places, self.values, self.linear.weight.shape, check_invariants=True)
        return self.linear(x) + torch.sparse.mm(beside, x.flatten(0, -2).T).T.view(*x.shape[:-1], -1)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch 2.11's, whatever is asked for
@pytest.mark.parametrize("engine", ENGINES)
def test_sparse_matrices_are_kept_as_they_are(engine):
    model = ROUTABLE["llama"]()
    for layer in model.model.layers:
        layer.self_attn.k_proj = SparseBeside(layer.self_attn.k_proj)
    input_ids = tokens(2, 16)
    kept = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    kept[:, -1] = False
    targets = torch.nn.functional.pad(input_ids[:, 1:], (0, 1), value=-100)
    loss, _ = reference_loss(
        model, model.model.layers, kept, kept / kept.sum(), targets, gradient="kv", input_ids=input_ids
    )
    loss.backward()
    expected = gradients(model)
    selection = Selection.from_mask(kept, countable=kept, capacity=int(kept.sum(1).max()))
    wrapped = CGGRModel(model, gradient="kv", engine=engine, selection="random")
    wrapped(input_ids, labels=input_ids, selection=selection, num_items=int(kept.sum())).backward()
    assert relative_error(gradients(model), expected) < 1e-5


def test_a_second_backward_finds_what_the_first_did():
    model = ROUTABLE["llama"]()
    loss = routed(model, seed=1)(tokens(), labels=tokens())
    loss.backward(retain_graph=True)
    first = gradients(model)
    loss.backward()
    second = gradients(model)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_weight_that_changes_in_between_is_noticed():
    model = ROUTABLE["llama"]()
    loss = routed(model, engine="two_pass")(tokens(), labels=tokens())
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.add_(1.0)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace operation"):
        loss.backward()


def test_what_a_hook_on_a_norm_sees():
    model, calls = ROUTABLE["llama"](), []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda _, args, out: calls.append(out.shape[1]))
    wrapped = routed(model, engine="two_pass")
    for _ in range(2):  # a model with a hook is compared at powers of two
        backward(wrapped, tokens())
    calls.clear()
    backward(wrapped, tokens())
    assert len(calls) == 2, "each pass calls it once, and the backward pass does not"
    assert calls[0] == 12


def test_whoever_sees_to_saved_tensors_sees_those_of_a_context_pass():
    seen = []

    def step():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.shape) or t, lambda t: t):
            return routed(ROUTABLE["llama"](), engine="two_pass", seed=1)(tokens(), labels=tokens())

    step().backward()
    assert torch.Size([36, 32]) in seen  # a norm of all tokens
    assert not remade.saved_tensors_are_hooked()


@pytest.mark.parametrize("engine", ENGINES)
def test_keys_and_values_are_let_go_of_as_layers_have_them(engine):
    model, input_ids = ROUTABLE["llama"](), tokens()
    wrapped = routed(model, "detached", engine)
    backward(wrapped, input_ids)
    passes = wrapped._passes
    batch = passes.inputs(input_ids=input_ids)
    keep = torch.zeros_like(input_ids, dtype=torch.bool)
    keep[:, 3:5] = True
    context, _ = passes.context(batch, depth=3 if engine == "two_pass" else 1, keep_graph=False, head=False)
    assert context.recorded
    passes.gradient(batch, Selection.from_mask(keep), context, keep_graph=False)
    assert not context.recorded


@pytest.mark.parametrize("engine", ENGINES)
def test_they_are_kept_for_layers_that_are_run_again(engine):
    wanted = backward(routed(ROUTABLE["llama"](), engine=engine, seed=1), tokens())
    model = ROUTABLE["llama"]()
    checkpoint_activations(model)
    loss, found = backward(routed(model, engine=engine, seed=1), tokens())
    assert torch.equal(loss, wanted[0])
    assert all(torch.equal(found[name], value) for name, value in wanted[1].items())


class Scaled(torch.nn.LayerNorm):
    """A norm with an attribute and an argument that its result depends on."""

    factor = 1.0

    def forward(self, x, scale=1.0):
        x = x[0] if isinstance(x, tuple) else x
        return super().forward(x) * self.factor * scale


class Block(torch.nn.Module):
    """Two norms, of which one is read by two projections, and a projection that reads no norm."""

    def __init__(self, norm=Scaled, **how):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm, self.other = norm(6, **how), norm(6, **how)
        self.a, self.b, self.c, self.d = (torch.nn.Linear(6, 5) for _ in range(4))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x, call=lambda norm, x: norm(x)):
        first, second = call(self.norm, x), call(self.other, x + 1)
        return torch.cat([self.a(first), self.b(first), self.c(second), self.d(second[:, :, :6]), self.a(x)], -1)


def of_block(block, *, made_again, mixed=False, backward_mixed=None, between=None, **how):
    """Values and gradients, with the norms made again in the backward pass or as autograd keeps them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 6, generator=generator).to(block.a.weight.dtype)
    linears = (block.a, block.b, block.c, block.d)
    architecture = SimpleNamespace(norms=((block.norm, block.other),), linears=(linears,), layers=[block])
    parameters = dict(block.named_parameters())
    with autocast(mixed), remade.remade_norms(architecture, 0) if made_again else nullcontext():
        out = block(x, **how)
    if between is not None:
        between(block, x)
    with autocast(mixed if backward_mixed is None else backward_mixed):
        (out.double() * torch.randn(out.shape, generator=generator)).sum().backward()
    return [out.detach(), *(p.grad for p in parameters.values() if p.requires_grad)]


def assert_same_as_autograd(make=Block, **how):
    found, wanted = (of_block(make(), made_again=again, **how) for again in (True, False))
    assert len(found) == len(wanted) and all(value is not None and value.abs().max() > 0 for value in wanted)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


CALLS = {
    "alone": lambda norm, x: norm(x),
    "positional": lambda norm, x: norm(x, 3.0),
    "keyword": lambda norm, x: norm(x, scale=3.0),
    "tuple": lambda norm, x: norm((x,)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_norm_is_made_again_as_it_was_called(call, mixed):
    assert_same_as_autograd(mixed=mixed, call=CALLS[call])


@pytest.mark.parametrize("dtype", [F32, torch.float64, BF16])
@pytest.mark.parametrize(("mixed", "backward_mixed"), [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize("norm", [Scaled, torch.nn.RMSNorm])
def test_norms_that_are_made_again_give_autograds_gradients(norm, mixed, backward_mixed, dtype):
    """Also where several projections share a cast of one, and whatever autocast is at the time of the backward pass."""
    assert_same_as_autograd(lambda: Block(norm).to(dtype), mixed=mixed, backward_mixed=backward_mixed)


@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "no bias"])
@pytest.mark.parametrize("mixed", [False, True])
def test_norms_with_parameters_that_are_frozen_or_missing(frozen, mixed):
    def make():
        block = Block(torch.nn.LayerNorm, bias=frozen != "no bias")
        for norm in (block.norm, block.other):
            norm.weight.requires_grad_(frozen not in ("weight", "both"))
            if norm.bias is not None:
                norm.bias.requires_grad_(frozen not in ("bias", "both"))
        return block

    assert_same_as_autograd(make, mixed=mixed)


@pytest.mark.parametrize("hooks", ["forward", "pre-forward"])
def test_a_norm_whose_hooks_set_it_up_is_left_alone(hooks):
    """They would not run when it is made again."""

    def make():
        block = Block()
        for norm in (block.norm, block.other):
            if hooks == "pre-forward":
                norm.register_forward_pre_hook(lambda norm, args: setattr(norm, "factor", norm.factor + 1))
            else:
                norm.register_forward_hook(lambda norm, args, out: setattr(norm, "factor", 7.0))
        return block

    assert_same_as_autograd(make)


def test_a_norm_is_made_again_of_the_parameters_that_it_had():
    def replace(block, x):
        block.norm.weight = torch.nn.Parameter(torch.zeros(6))
        del block.other.bias
        block.other.register_parameter("bias", None)

    assert_same_as_autograd(between=replace)


@pytest.mark.parametrize("what", ["hidden state", "weight", "bias"])
def test_what_a_norm_is_made_of_must_not_change_before_it_is_made_again(what):
    def change(block, x):
        with torch.no_grad():
            (x if what == "hidden state" else getattr(block.other, what)).mul_(2)

    with pytest.raises(RuntimeError, match="was changed in place between the forward and the backward pass"):
        of_block(Block(), made_again=True, between=change)


def test_which_modules_of_a_layer_are_called_in_another_way():
    def replaced(change):
        block = Block()
        change(block)
        norms = (block.norm, block.other)
        architecture = SimpleNamespace(norms=(norms,), linears=((block.a, block.b),), layers=[block])
        with remade.remade_norms(architecture, 0):
            found = {name for name, part in block.named_children() if "forward" in vars(part)}
        assert not any("forward" in vars(part) for part in block.modules())
        return found

    def compiled(part):
        part._compiled_call_impl = part._call_impl  # what compile() sets, without its time

    everything = {"norm", "other", "a", "b"}
    assert replaced(lambda block: None) == everything
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        assert replaced(lambda block, name=register: getattr(block.norm, name)(lambda *_: None)) == everything - {
            "norm"
        }
    assert replaced(lambda block: compiled(block.norm)) == {"other"}
    assert replaced(lambda block: compiled(block.d)) == replaced(compiled) == {"norm", "other"}
    assert replaced(lambda block: (compiled(block.norm), compiled(block.other))) == set()


@pytest.mark.parametrize("settings", [{"engine": engine} for engine in ENGINES] + [{"gradient": "detached"}])
def test_a_step_leaves_no_tensor_in_a_reference_cycle(settings):
    """Python may look for cycles only many steps later, and until then they would hold memory of the device."""
    model, input_ids = CGGRModel(ROUTABLE["llama"](), selection="supervised", **settings).train(), tokens()
    for _ in range(3):
        model(input_ids, labels=at_the_end(input_ids)).backward()
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        model(input_ids, labels=at_the_end(input_ids)).backward()
        gc.collect()
        assert not [found for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
