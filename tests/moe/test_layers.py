"""The layer: shapes, losses, masks, balancing, state, errors."""

import pytest
import torch
from torch.nn.functional import linear, silu

from cggr_core import CGGRScorer
from cggr_moe import PersistentTRMLP, create_persistent_tr_mlp


def make(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"hidden_dim": 16, "intermediate_dim": 24, "num_experts": 4, "top_k": 2} | options
    return create_persistent_tr_mlp(**sizes)


def plain(layer, x, mask=None):
    """The layer written out with autograd over all experts."""
    probability = linear(x, layer.gate.weight).softmax(-1)
    weight, index = probability.topk(layer.top_k, dim=-1)
    weight = weight / weight.sum(-1, keepdim=True) if layer.norm_topk_prob else weight
    gate, up = torch.einsum("th,eih->tei", x, layer.gate_up_proj).chunk(2, dim=-1)
    every = torch.einsum("tei,ehi->teh", silu(gate) * up, layer.down_proj)
    out = (every.gather(1, index[..., None].expand(-1, -1, x.shape[1])) * weight[..., None]).sum(1)
    return out if mask is None else out * mask[:, None]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("E", "K"), [(4, 2), (1, 1), (3, 3), (8, 1)])
def test_gradients_of_every_parameter_and_the_input(E, K, norm):
    layer = make(num_experts=E, top_k=K, norm_topk_prob=norm, dtype=torch.float64)
    x = torch.randn(11, 16, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(11, 16, dtype=torch.float64)
    leaves = (x, *layer.parameters())
    out, _ = layer(x)
    truth = plain(layer, x)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-14)
    for value, expected in zip(
        torch.autograd.grad(out, leaves, upstream), torch.autograd.grad(truth, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_shapes(dtype):
    layer = make(dtype=dtype)
    x = torch.randn(2, 5, 16).to(dtype)
    out, aux_loss = layer(x)
    assert (out.shape, out.dtype, aux_loss.shape, aux_loss.dtype) == (x.shape, dtype, (), torch.float32)
    flat, same = layer(x.reshape(10, 16))
    assert torch.equal(flat.view(2, 5, 16), out)
    assert same == aux_loss
    assert layer(x[:, :0])[0].shape == (2, 0, 16)


def test_masked_tokens_get_zeros_and_change_nothing():
    layer = make(z_loss=0.5)
    x = torch.randn(3, 4, 16, requires_grad=True)
    mask = torch.rand(3, 4) > 0.5
    out, aux_loss = layer(x, mask)
    assert (out[~mask] == 0).all()
    assert layer.metrics["tokens_per_expert"].sum() == 2 * mask.sum()
    found = dict(layer.metrics)
    alone, aux_alone = layer(x[mask])
    for name, value in found.items():
        torch.testing.assert_close(value, layer.metrics[name])
    torch.testing.assert_close(out[mask], alone)
    torch.testing.assert_close(aux_loss, aux_alone)
    (gradient,) = torch.autograd.grad(out.sum() + aux_loss, x)
    assert (gradient[~mask] == 0).all()
    nothing, zero = layer(x, torch.zeros_like(mask))
    assert (nothing == 0).all()
    assert zero == 0
    assert zero.requires_grad


def test_weights_start_as_those_of_linear_layers():
    layer = make(hidden_dim=16, intermediate_dim=64, num_experts=16)
    for weight, fan_in in ((layer.gate.weight, 16), (layer.gate_up_proj, 16), (layer.down_proj, 64)):
        assert 0.95 * fan_in**-0.5 < weight.abs().max() <= fan_in**-0.5


def test_takes_the_mask_of_a_scorer():
    embedding = torch.nn.Embedding(32, 16)

    def router(input_ids, **_):
        return embedding(input_ids) @ embedding.weight.t()

    input_ids = torch.randint(0, 32, (2, 16))
    _, mask, _ = CGGRScorer(router, scoring="entropy", min_tokens_ratio=0.25)(input_ids)
    layer = make()
    out, _ = layer(embedding(input_ids), mask)
    assert 0 < mask.sum() < mask.numel()
    assert (out.abs().sum(-1) > 0).equal(mask)
    assert layer.metrics["tokens_per_expert"].sum() == 2 * mask.sum()


def test_losses_and_metrics():
    layer = make(z_loss=0.5)
    _, aux_loss = layer(torch.randn(64, 16))
    assert set(layer.metrics) == {"tokens_per_expert", "entropy", "balance_loss", "z_loss"}
    assert not any(value.requires_grad for value in layer.metrics.values())
    torch.testing.assert_close(aux_loss.detach(), layer.metrics["balance_loss"] + 0.5 * layer.metrics["z_loss"])
    assert 0.9 < layer.metrics["balance_loss"] < 2
    gradient = torch.autograd.grad(aux_loss, layer.gate.weight)[0]
    assert gradient.norm() > 0


def test_the_router_bias_evens_out_the_load():
    layer = make(num_experts=8, top_k=1, router_bias=True, bias_update_rate=0.02)
    x = torch.randn(256, 16) + 0.7 * torch.randn(16)
    layer(x)
    before = layer.metrics["tokens_per_expert"].max()
    for _ in range(60):
        layer(x)
        layer.update_router_bias()
    layer(x)
    after = layer.metrics["tokens_per_expert"].max()
    assert after < before
    assert after <= 2 * 256 / 8
    assert layer._load.sum() == 256
    layer.eval()
    layer(x)
    assert layer._load.sum() == 256


def test_the_load_is_summed_over_ranks(monkeypatch):
    layer = make(router_bias=True)
    layer._load.copy_(torch.tensor([4, 0, 2, 2]))

    def all_reduce(tensor):
        tensor.add_(torch.tensor([0, 9, 0, 0]))

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    layer.update_router_bias()
    torch.testing.assert_close(layer.router_bias, torch.tensor([1e-3, -1e-3, 1e-3, 1e-3]))
    with pytest.raises(RuntimeError, match="no router bias"):
        make().update_router_bias()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_leave_the_router_bias_in_float32(dtype):
    layer = make(router_bias=True)
    layer.router_bias.fill_(0.5)
    layer.to(dtype)
    assert layer.gate.weight.dtype == dtype
    layer(torch.randn(5, 16, dtype=dtype))
    layer.update_router_bias()
    assert layer.router_bias.dtype == torch.float32
    assert set((layer.router_bias - 0.5).abs().mul(1e3).round().tolist()) <= {0.0, 1.0}
    assert (layer.router_bias > 0.5).any()
    assert make(router_bias=True).to("meta").router_bias.is_meta


@pytest.mark.parametrize("router_bias", [False, True])
def test_state_round_trip(router_bias):
    layer, other = make(0, router_bias=router_bias), make(1, router_bias=router_bias)
    if router_bias:
        layer.router_bias.normal_()
    state = layer.state_dict()
    assert set(state) == {"gate.weight", "gate_up_proj", "down_proj"} | ({"router_bias"} if router_bias else set())
    other.load_state_dict(state)
    x = torch.randn(9, 16)
    assert torch.equal(layer(x)[0], other(x)[0])


def test_autocast_computes_in_its_dtype():
    layer = make()
    x = torch.randn(9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, aux_loss = layer(x)
    assert out.dtype == torch.bfloat16
    assert aux_loss.dtype == torch.float32
    out.float().sum().backward()
    assert layer.down_proj.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph(dtype):
    layer = make(dtype=dtype)
    x = torch.randn(9, 16, dtype=dtype)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for value, expected in zip(compiled(x), layer(x), strict=True):
        torch.testing.assert_close(value, expected)


def test_layers_without_their_arguments():
    for message, options in {
        "top_k must be at most num_experts=4, got 5": {"top_k": 5},
        "top_k must be at least 1": {"top_k": 0},
        "hidden_dim must be at least 1": {"hidden_dim": 0},
        "activation must be one of 'swiglu', got 'geglu'": {"activation": "geglu"},
        "z_loss must be a finite number": {"z_loss": float("nan")},
    }.items():
        with pytest.raises(ValueError, match=message):
            make(**options)
    for message, options in {
        "norm_topk_prob must be True or False, got 'false'": {"norm_topk_prob": "false"},
        "router_bias must be True or False, got 1": {"router_bias": 1},
        r"dtype must be a floating torch dtype or None, got torch\.int64": {"dtype": torch.int64},
        "dtype must be a floating torch dtype or None, got 'bfloat16'": {"dtype": "bfloat16"},
    }.items():
        with pytest.raises(TypeError, match=message):
            make(**options)


def test_bad_input_is_named():
    layer = make()
    x = torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match=r"hidden_states must have shape \[B, S, 16\] or \[T, 16\], got \(2, 5, 15\)"):
        layer(x[..., 1:])
    with pytest.raises(
        ValueError, match=r"hidden_states must have the dtype of gate\.weight, got torch\.float16 and torch\.float32"
    ):
        layer(x.half())
    layer.down_proj.data = layer.down_proj.data.half()
    with pytest.raises(ValueError, match=r"dtype of down_proj, got torch\.float32 and torch\.float16"):
        layer(x)
    layer = make()
    with pytest.raises(ValueError, match="hidden_states is on meta"):
        layer(x.to("meta"))
    with pytest.raises(TypeError, match="floating dtype"):
        layer(x.long())
    with pytest.raises(ValueError, match=r"token_mask must have shape \(2, 5\)"):
        layer(x, torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match="token_mask must be bool"):
        layer(x, torch.ones(2, 5))
    for bad in (torch.nan, torch.inf):
        x[1, 2, 3] = bad
        with pytest.raises(ValueError, match=r"router logits of 1 token\(s\) have no softmax \(from hidden_states\)"):
            layer(x)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 2] = False
    assert layer(x, mask)[0].isfinite().all()


def test_repr():
    assert "num_experts=4, top_k=2" in repr(make())
    assert isinstance(make(), PersistentTRMLP)


@pytest.mark.parametrize("fill", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(2, 5, 16), (10, 16)])
def test_what_a_masked_token_holds_reaches_no_gradient(shape, fill):
    layer = PersistentTRMLP(16, 32, num_experts=4, top_k=2, z_loss=0.1)
    states = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    mask[0] = False
    found = []
    for value in (0.0, fill):
        given = states.masked_fill(~mask[..., None], value).requires_grad_()
        layer.zero_grad()
        output, aux_loss = layer(given, mask)
        (output.square().sum() + aux_loss).backward()
        found.append([output, aux_loss, given.grad, *(parameter.grad.clone() for parameter in layer.parameters())])
    assert all(torch.equal(wanted, dirty) for wanted, dirty in zip(*found, strict=True))
    assert all(grad.any() for grad in found[0][2:])
