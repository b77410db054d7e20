"""One norm, recomputed in the backward pass: what has a graph, what is held, and how often it is computed."""

import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cggr_core.routing import norms, precision, remade
from tests.support.tiny_models import ROUTABLE

BF16 = torch.bfloat16


def layer(*parts, linears=()):
    """A layer of norms and linear layers, as a description lists it."""
    return SimpleNamespace(norms=(parts,), linears=(linears,), layers=[nn.ModuleList([*parts, *linears])])


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fused():
    """A model's norm, and torch's op for it."""
    norm = ROUTABLE["llama"]().model.norm
    return norm, norms.fused_norms([norm])[norm]


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_a_norm_has_a_graph_in_the_backward_pass_if_a_parameter_is_trained(frozen, monkeypatch):
    norm, x = nn.LayerNorm(6), rows(3, 6)
    for name in frozen:
        getattr(norm, name).requires_grad_(False)
    made = remade._Norm(norm, norm.forward, x)
    assert made.in_turn is made.again().requires_grad is (len(frozen) < 2)
    assert not made.take(None, weighted=True).requires_grad
    # Where the norm's own graph holds no more than its input, it is built in the forward.
    monkeypatch.setattr(remade, "_keeps_little", lambda *_: True)
    early = remade._Norm(norm, norm.forward, x)
    assert not early.in_turn and not early.again().requires_grad


def test_the_weight_that_a_projection_can_share_its_product_with(fused):
    norm, forward = fused
    x = rows(3, norm.weight.shape[0])
    assert remade._Norm(norm, forward, x).weight is norm.weight
    assert remade._Norm(norm, norm.forward, x).weight is None, "its own forward may compute anything"
    norm.weight.requires_grad_(False)
    assert remade._Norm(norm, forward, x).weight is None, "a frozen one has no gradient to share"
    bare = nn.RMSNorm(6, elementwise_affine=False)
    assert remade._Norm(bare, partial(norms._forward, bare, 1e-6), rows(3, 6)).weight is None


def test_a_norm_is_computed_once_more_however_many_read_it():
    calls = []

    class Counted(nn.LayerNorm):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    for trained in (True, False):
        norm, linears = Counted(6).requires_grad_(trained), (nn.Linear(6, 5), nn.Linear(6, 4))
        with remade.remade_norms(layer(norm, linears=linears), 0):
            made = norm(rows(3, 6))
            out = torch.cat([linear(made) for linear in linears], 1)
        calls.clear()
        out.square().sum().backward()
        assert calls == [3]
        assert all(part.weight.grad.abs().max() > 0 for part in linears)


def test_norms_are_held_until_keys_and_values_are_passed_on():
    first, second, x = nn.LayerNorm(6), nn.LayerNorm(6), rows(3, 6)
    with remade.remade_norms(layer(first, second), 0):
        made = weakref.ref(first(x))
        assert made() is not None, "another tensor could take its memory"
        with torch.no_grad():
            second(x)
        assert made() is None


def test_a_norm_with_a_product_runs_under_the_autocast_of_its_forward():
    class Mixing(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x @ self.bias.diag()).float()

    def gradients(again):
        norm, linear = Mixing(6), nn.Linear(6, 5)
        with torch.no_grad():
            for seed, parameter in enumerate((*norm.parameters(), *linear.parameters())):
                parameter.copy_(rows(*parameter.shape, seed=seed))
        forward = norm.forward
        with torch.autocast("cpu", BF16):
            if again:
                with remade.remade_norms(layer(norm, linears=(linear,)), 0):
                    out = linear(norm(rows(3, 6)))
            else:
                out = linear(forward(rows(3, 6)))
        out.float().square().sum().backward()
        return norm.weight.grad, norm.bias.grad, linear.weight.grad

    for found, wanted in zip(gradients(True), gradients(False), strict=True):
        assert wanted.abs().max() > 0 and torch.equal(found, wanted)


class Casts(TorchDispatchMode):
    """Counts casts of tensors of one shape to bfloat16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.shape == self.shape and out.dtype == BF16:
            self.count += 1
        return out


def test_projections_of_one_norm_share_a_cast_of_it():
    norms_of, linears = (nn.LayerNorm(6), nn.LayerNorm(6)), tuple(nn.Linear(6, 5) for _ in range(4))
    with (
        remade.remade_norms(layer(*norms_of, linears=linears), 0),
        torch.autocast("cpu", BF16),
        Casts((3, 6)) as casts,
    ):
        first, second = (norm(rows(3, 6)) for norm in norms_of)
        for linear, x in zip(linears, (first, first, second, second), strict=True):
            linear(x)
    assert casts.count == 2


def test_the_gradient_of_a_norms_weight_is_not_rounded_to_that_of_the_projection():
    weight, of_norm = rows(50, 6).to(BF16).requires_grad_(), rows(6, seed=1).requires_grad_()
    product = rows(50, 6, seed=2).to(BF16)
    remade._WeightOfBoth.apply(weight, of_norm).backward(product)
    truth = (weight.double() * product.double()).sum(0)
    assert of_norm.grad.dtype == torch.float32 and weight.grad.dtype == BF16
    assert (of_norm.grad.double() - truth).abs().max() < 0.02 * truth.abs().max()
    assert not torch.equal(of_norm.grad, of_norm.grad.to(BF16).float())
    torch.testing.assert_close(weight.grad, (product * of_norm.detach()).to(BF16))


def test_a_shared_product_has_no_second_derivative():
    weight, of_norm = rows(5, 6).requires_grad_(), rows(6, seed=1).requires_grad_()
    made = remade._WeightOfBoth.apply(weight, of_norm)
    (grad,) = torch.autograd.grad(made.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_linear_layers_are_left_alone_where_no_norm_is_recomputed():
    norm, linear = nn.LayerNorm(6), nn.Linear(6, 5)
    norm.register_forward_hook(lambda *_: None)
    with remade.remade_norms(layer(norm, linears=(linear,)), 0):
        assert "forward" not in vars(norm) and "forward" not in vars(linear)


def test_which_linear_layers_can_share_their_product():
    """Those that run as they are where gradients are on; in FP8, queries do not."""
    linear, low = nn.Linear(16, 16), precision.LowPrecision(nn.ModuleList([nn.Linear(16, 16)]))
    for queries in (False, True):
        assert precision.runs_plainly(partial(low._linear, linear, queries)) is not queries
    assert precision.runs_plainly(linear.forward)
    for other in (
        partial(linear.forward, None, False),
        nn.LayerNorm(16).forward,
        lambda x: x,
        partial(low._quantised, 1, 0),
    ):
        assert not precision.runs_plainly(other)
