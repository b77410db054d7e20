"""Fused ops in the layers: recognised numerically, used if there is a kernel, without changing the step's numbers."""

import types
from functools import partial

import pytest
import torch
from torch import nn

import cggr_core.routing.fusions as fusions
from cggr_core import CGGRModel
from cggr_core.elementwise import rotary_in_place, rotary_reference, silu_mul_reference
from cggr_core.routing import fused_forwards
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB

# Model -> what is recognised in its layers besides norms.
RECOGNISED = {
    "llama": {"rotary", "silu_mul"},
    "mistral-sliding": {"rotary", "silu_mul"},
    "qwen3": {"rotary", "silu_mul"},
    "olmo2": {"rotary", "silu_mul"},
    "mixtral": {"rotary"},
    "gemma": {"rotary"},
    "phi3": {"rotary"},
    "cohere": {"silu_mul"},  # its rotary embedding turns neighbouring pairs
    "gpt2": set(),
    "bloom": set(),
}


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """Call counts of stand-ins for the kernels: the references under other names."""
    counts = {"rotary": 0, "silu_mul": 0}
    references = {"rotary": rotary_reference, "silu_mul": silu_mul_reference}

    def resolve(op, device_type, dtype=None):
        def kernel(*args):
            counts[op] += 1
            return references[op](*args)

        return kernel

    monkeypatch.setattr(fusions, "resolve", resolve)
    return counts


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", RECOGNISED)
def test_what_is_recognised_runs_and_changes_no_number(name, calls, monkeypatch):
    model, input_ids = ROUTABLE[name](), tokens()
    settings = {"selection": "random", "gradient": "kv", "engine": "interleaved"}
    CGGRModel(model, **settings).train()(input_ids, labels=input_ids, draw=1).backward()
    found = gradients(model)
    assert {op for op, count in calls.items() if count} == RECOGNISED[name]
    monkeypatch.setattr("cggr_core.routing.probe.fused_forwards", lambda modules: {})
    CGGRModel(model, **settings).train()(input_ids, labels=input_ids, draw=1).backward()
    assert relative_error(found, gradients(model)) <= 1e-5


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_layer_of_every_pass_runs_fused_and_the_model_is_left_as_it_was(engine, checkpointing, calls):
    model, input_ids = ROUTABLE["llama"]().train(), tokens()
    if checkpointing:
        for layer in model.model.layers:
            layer.gradient_checkpointing = True
    wrapped = CGGRModel(model, selection="random", engine=engine).train()
    wrapped(input_ids, labels=input_ids).backward()
    calls.update(rotary=0, silu_mul=0)
    wrapped(input_ids, labels=input_ids).backward()
    layers = len(model.model.layers)
    # Kept and other tokens each, and the kept ones again where layers are recomputed; in the last layer of the
    # interleaved engine, the other tokens stop at their keys and values.
    recomputed = layers if checkpointing else 0
    assert calls["rotary"] == 2 * layers + recomputed
    assert calls["silu_mul"] == 2 * layers + recomputed - (engine == "interleaved")
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("trains", [False, True])
def test_without_a_kernel_the_models_own_formulas_run(dtype, trains, monkeypatch):
    """Bit for bit, though in float32 on a CPU, rotary embeddings are turned in place."""
    model, input_ids = ROUTABLE["llama"]().to(dtype), tokens()
    monkeypatch.setattr("torch.nn.functional.rms_norm", None)
    with torch.set_grad_enabled(trains):
        wanted = model(input_ids=input_ids).logits
        for module, forward in fused_forwards(model.modules()).items():
            if "Norm" not in type(module).__name__:
                module.forward = forward
        found = model(input_ids=input_ids).logits
    assert torch.equal(found, wanted)


def test_rotary_in_place_has_the_gradients_of_the_reference():
    generator = torch.Generator().manual_seed(2)
    q, k, cos, sin, upstream, other = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in [(2, 5, 4, 8), (2, 5, 2, 8), (1, 5, 8), (1, 5, 8), (2, 4, 5, 8), (2, 2, 5, 8)]
    )
    parts = [part.transpose(1, 2).requires_grad_() for part in (q, k)]  # as a model's: heads are not first in memory
    wanted = rotary_reference(*parts, cos, sin)
    found = [rotary_in_place(part, cos, sin) for part in parts]
    assert_same(found, wanted)
    assert_same(*(torch.autograd.grad(turned, parts, (upstream, other)) for turned in (found, wanted)))
    assert torch.autograd.gradcheck(lambda part: rotary_in_place(part, cos, sin), parts[0])
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(rotary_in_place(parts[0], cos, sin), parts[0], upstream, create_graph=True)


def test_gated_activations_leave_what_the_projections_made(monkeypatch):
    """Outputs of linear layers may be held by somebody else, so only the activation's own is overwritten."""
    mlp = ROUTABLE["llama"]().model.layers[0].mlp
    x = torch.randn(2, 3, mlp.gate_proj.in_features, generator=torch.Generator().manual_seed(0))
    held = []
    for layer in (mlp.gate_proj, mlp.up_proj):
        layer.register_forward_hook(lambda module, args, output: held.append((output, output.clone())))
    with torch.no_grad():
        wanted = mlp(x)
        held.clear()
        assert torch.equal(fused_forwards([mlp])[mlp](x), wanted)
    assert len(held) == 2
    assert all(torch.equal(output, before) for output, before in held)


def test_modules_that_somebody_replaced_or_compiled_are_left_as_they_are():
    model = ROUTABLE["llama"]()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    attention.forward = types.MethodType(type(attention).forward, attention)
    mlp.compile(backend="eager")
    subclass = type("Own", (type(mlp),), {"__module__": "somewhere.else"})
    other = model.model.layers[1].mlp
    other.__class__ = subclass
    assert not {attention, mlp, other} & set(fused_forwards(model.modules()))


def test_a_gated_mlp_of_another_formula_is_left_as_it_is():
    mlp = ROUTABLE["llama"]().model.layers[0].mlp

    class Doubled(type(mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    Doubled.__module__ = "transformers.models.doubled"
    mlp.__class__ = Doubled
    assert fused_forwards([mlp]) == {}
    gelu = ROUTABLE["llama"]().model.layers[0].mlp
    gelu.act_fn = nn.GELU()
    assert fused_forwards([gelu]) == {}


def halves(q, k, cos, sin, unsqueeze_dim=1):
    """Rotary embedding as transformers writes it."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    return turned(q), turned(k)


def other_direction(q, k, cos, sin):
    return halves(q, k, cos, -sin)


def neighbours(q, k, cos, sin):
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def turned(x):
        pairs = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos + pairs * sin

    return turned(q), turned(k)


def slightly_larger(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    return q, 1.0005 * k


def flat(q, k, cos, sin):
    q, k = halves(q, k, cos, sin)
    return q.flatten(1, 2), k


def queries_alone(q, k, cos, sin):
    return halves(q, k, cos, sin)[0]


def a_list(q, k, cos, sin):
    return list(halves(q, k, cos, sin))


def one_more(q, k, cos, sin):
    return *halves(q, k, cos, sin), None


def other_order(k, q, cos, sin):
    return halves(k, q, cos, sin)


def whole_heads_alone(q, k, cos, sin):
    raise RuntimeError("head_dim must be 64")


def attention_with(rotary, home: str = "transformers.models.fake") -> nn.Module:
    """An attention whose forward finds ``apply_rotary_pos_emb`` where its class is written."""
    names = {"nn": nn, "apply_rotary_pos_emb": rotary}
    exec(
        "class Attention(nn.Module):\n"
        "    def forward(self, q, k, cos, sin, *args, again=False, **options):\n"
        "        turned = apply_rotary_pos_emb(q, k, cos, sin, *args, **options)\n"
        "        return apply_rotary_pos_emb(*turned, cos, sin) if again else turned\n",
        names,
    )
    names["Attention"].__module__ = home
    return names["Attention"]()


def rotary_operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8), (2, 5, 8)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_an_attention_that_turns_halves_does_so_in_the_kernel(calls):
    attention, operands = attention_with(halves), rotary_operands()
    forward = fused_forwards([nn.Linear(2, 2), attention])[attention]
    assert_same(forward(*operands, again=True), attention(*operands, again=True))
    assert calls["rotary"] == 2


@pytest.mark.parametrize(
    "rotary",
    [
        other_direction,
        neighbours,
        slightly_larger,
        flat,
        queries_alone,
        a_list,
        one_more,
        other_order,
        whole_heads_alone,
        None,
    ],
)
def test_a_rotary_embedding_of_another_formula_is_left_as_it_is(rotary):
    assert fused_forwards([attention_with(rotary)]) == {}


def test_attentions_of_others_and_without_a_rotary_embedding_are_left_as_they_are():
    assert fused_forwards([attention_with(halves, "transformers_modules.own")]) == {}
    assert fused_forwards([ROUTABLE["gpt2"]().transformer.h[0].attn]) == {}
    called = attention_with(halves)
    type(called).forward = partial(type(called).forward, called)
    assert fused_forwards([called]) == {}


@pytest.mark.parametrize(
    "changed",
    ["dtypes", "float64", "no batch", "flat cosines", "some features", "cosines to learn", "an argument", "an option"],
)
def test_a_call_that_the_kernel_was_not_made_for_runs_the_models_own_code(changed, calls):
    q, k, cos, sin = rotary_operands(torch.float64 if changed == "float64" else torch.float32)
    args, options = (), {}
    if changed == "dtypes":
        k = k.to(torch.bfloat16)
    elif changed == "no batch":
        q, k = q[0], k[0]
    elif changed == "flat cosines":
        q = k = torch.cat([q, k], dim=1)[:, 1:]
        cos, sin = cos[0], sin[0]
    elif changed == "some features":
        cos, sin = cos[..., :1], sin[..., :1]
    elif changed == "cosines to learn":
        cos.requires_grad_()
    elif changed == "an argument":
        args = (1,)
    elif changed == "an option":
        options = {"unsqueeze_dim": 1}
    attention = attention_with(halves)
    found = fused_forwards([attention])[attention](q, k, cos, sin, *args, **options)
    assert calls["rotary"] == 0
    assert_same(found, halves(q, k, cos, sin, *args, **options))


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        for name, (inputs, outputs) in {"gate_proj": (4, 6), "up_proj": (4, 6), "down_proj": (6, 4)}.items():
            linear = nn.Linear(inputs, outputs, bias=False)
            linear.weight.data.copy_(torch.randn(outputs, inputs, generator=generator))
            self.add_module(name, linear)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OtherHalf(GatedMLP):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Summed(GatedMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class SlightlyLarger(GatedMLP):
    def forward(self, x):
        return 1.0005 * super().forward(x)


class WithNoise(GatedMLP):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return super().forward(self.dropout(x) if self.training else x)


class ReturnsMore(GatedMLP):
    def forward(self, x):
        return super().forward(x), None


class ReturnsABatch(GatedMLP):
    def forward(self, x):
        return super().forward(x)[None]


class AsksForMore(GatedMLP):
    def forward(self, x, scale=None):
        return super().forward(x) * scale


def fake_mlp(kind: type[GatedMLP], home: str = "transformers.models.fake") -> nn.Module:
    return type(kind.__name__, (kind,), {"__module__": home})()


def test_a_gated_mlp_runs_its_product_in_the_kernel(calls):
    mlp, x = fake_mlp(GatedMLP), torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(3))
    found = fused_forwards([fake_mlp(Summed), nn.SiLU(), mlp])
    assert set(found) == {mlp}
    torch.testing.assert_close(found[mlp](x), mlp(x))
    assert calls["silu_mul"] == 1


@pytest.mark.parametrize(
    "kind", [OtherHalf, Summed, SlightlyLarger, WithNoise, ReturnsMore, ReturnsABatch, AsksForMore]
)
def test_gated_mlps_that_differ_in_one_thing_are_left_as_they_are(kind):
    assert fused_forwards([fake_mlp(kind)]) == {}
    assert fused_forwards([fake_mlp(kind).eval()]) == {}, "noise is there in training"


def test_a_place_that_holds_nothing_is_no_part_of_a_gated_mlp():
    mlp = fake_mlp(GatedMLP)
    mlp.register_module("dropout", None)
    assert set(fused_forwards([mlp])) == {mlp}


def test_gated_mlps_of_others_and_of_other_activations_are_left_as_they_are():
    assert fused_forwards([fake_mlp(GatedMLP, "somewhere.else")]) == {}
    kind = type(fake_mlp(GatedMLP))
    ours, other, without = kind(), kind(), kind()
    other.act_fn = nn.GELU()
    del without.act_fn
    assert set(fused_forwards([ours, other, without])) == {ours}, "modules of one class are told apart"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_it_is_tried_out_in_float32_on_numbers_of_its_own(dtype, monkeypatch):
    modules = [*ROUTABLE["llama"]().modules(), fake_mlp(SlightlyLarger), attention_with(slightly_larger)]
    wanted, state = set(fused_forwards(modules)), torch.get_rng_state()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert set(fused_forwards(modules)) == wanted
    finally:
        torch.set_default_dtype(before)
    assert torch.get_rng_state().equal(state)
    assert len(wanted) == 13  # seven norms, and an attention and an MLP in each of three layers


@pytest.mark.parametrize("changed", ["gate", "up", "both", "width"])
def test_a_product_that_the_kernel_was_not_made_for_runs_the_models_own_code(changed, calls):
    class Cast(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    class Narrow(nn.Linear):
        def forward(self, x):
            return super().forward(x)[..., :1]

    mlp, x = fake_mlp(GatedMLP), torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    for name in {"both": ("gate", "up"), "width": ()}.get(changed, (changed,)):
        mlp.get_submodule(f"{name}_proj").__class__ = Cast
        mlp.down_proj.double()
    if changed == "width":
        mlp.up_proj.__class__ = Narrow
    found = fused_forwards([mlp])[mlp](x)
    assert calls["silu_mul"] == 0
    assert found.equal(mlp(x))


def test_the_module_that_an_attention_is_written_in_is_not_changed(calls):
    model = ROUTABLE["llama"]()
    module = __import__(type(model).__module__, fromlist=["apply_rotary_pos_emb"])
    own = module.apply_rotary_pos_emb
    CGGRModel(model).train()(tokens(), labels=tokens()).backward()
    assert calls["rotary"] > 0
    assert module.apply_rotary_pos_emb is own
