"""The reference of the experts against a loop over tokens in float64."""

import pytest
import torch

from cggr_moe import grouped
from cggr_moe.grouped import moe_experts_reference as experts


def problem(T, H, I, E, K, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, gate_up, down = (
        (torch.randn(size, generator=generator) * 0.5).to(dtype) for size in ((T, H), (E, 2 * I, H), (E, H, I))
    )
    index = torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    weight = torch.rand(T, K, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    return x, gate_up, down, index, weight


def loop(x, gate_up, down, index, weight):
    """Token by token, choice by choice."""
    I = down.shape[2]
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros_like(x[t])
        for k in range(index.shape[1]):
            if (expert := int(index[t, k])) >= 0:
                gate, up = (gate_up[expert] @ x[t]).split(I)
                row = row + weight[t, k] * (down[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def values_and_gradients(function, x, gate_up, down, index, weight):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, gate_up, down, weight)]
    out = function(*leaves[:3], index, leaves[3])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def check_against_truth(*operands):
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[
        operands[0].dtype
    ]
    doubles = [tensor.double() if tensor.is_floating_point() else tensor for tensor in operands]
    truths = values_and_gradients(loop, *doubles)
    for value, truth in zip(values_and_gradients(experts, *operands), truths, strict=True):
        assert (value.double() - truth).norm() <= tolerance * truth.norm() + 1e-30


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "H", "I", "E", "K"),
    [(7, 16, 24, 4, 2), (1, 8, 8, 3, 1), (5, 8, 16, 1, 1), (6, 16, 8, 3, 3), (5, 7, 3, 4, 2)],
)
def test_outputs_and_gradients(T, H, I, E, K, dtype):
    check_against_truth(*problem(T, H, I, E, K, dtype))


@pytest.mark.parametrize("device_values_are_free", [True, False])
def test_null_choices_and_empty_experts(monkeypatch, device_values_are_free):
    """Also in the form that other devices take, where the host does not read how many choices there are."""
    monkeypatch.setattr(grouped, "values_are_free", lambda tensor: device_values_are_free)
    x, gate_up, down, index, weight = problem(9, 16, 8, 6, 2)
    index[index == 2] = 3  # both choices of a token may be the same
    index[::3] = -1
    check_against_truth(x, gate_up, down, index, weight)
    out = experts(x, gate_up, down, index, weight)
    assert (out[::3] == 0).all()
    nothing = values_and_gradients(experts, x, gate_up, down, torch.full_like(index, -1), weight)
    assert all((value == 0).all() for value in nothing)
    check_against_truth(x, gate_up, down, torch.zeros_like(index), weight)


def test_no_tokens():
    x, gate_up, down, index, weight = problem(4, 8, 8, 2, 1)
    leaves = [tensor.detach().requires_grad_() for tensor in (x[:0], gate_up, down)]
    out = experts(*leaves, index[:0], weight[:0])
    assert out.shape == (0, 8)
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(out.sum(), leaves))


def test_gradcheck():
    x, gate_up, down, index, weight = problem(4, 3, 2, 3, 2, torch.float64)
    leaves = [tensor.double().requires_grad_() for tensor in (x, gate_up, down, weight)]
    assert torch.autograd.gradcheck(lambda x, g, d, w: experts(x, g, d, index, w), leaves)


def test_null_choices_cost_no_rows(monkeypatch):
    rows = []
    product = grouped._grouped_linear

    def counted(x, weight, load):
        rows.append(x.shape[0])
        return product(x, weight, load)

    monkeypatch.setattr(grouped, "_grouped_linear", counted)
    x, gate_up, down, index, weight = problem(8, 8, 8, 4, 2)
    index[:6] = -1
    experts(x, gate_up, down, index, weight)
    assert rows == [4, 4]
