"""Rotary embedding and silu(gate) * up: values and gradients are as close to float64 as torch's in the same dtype."""

import pytest
import torch

from cggr_core.elementwise import rotary_reference, silu_mul_reference
from cggr_kernels.rotary import rotary
from cggr_kernels.silu_mul import silu_mul

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton's interpreter cuts bfloat16 off instead of rounding it.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 8e-3}


def angles(B, S, D, device, dtype, halves="same"):
    position = torch.randint(0, 500, (B, S, 1), device=device)
    frequency = 100.0 ** -torch.linspace(0, 1, D // 2, device=device)
    angle = position * frequency
    angle = torch.cat((angle, angle if halves == "same" else 0.3 * angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def with_gradients(function, differentiable, rest=()):
    leaves = [x.detach().clone().requires_grad_() for x in differentiable]
    out = function(*leaves, *rest)
    outs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(x.shape, generator=generator).to(x) for x in outs]
    return [x.detach() for x in outs] + list(torch.autograd.grad(outs, leaves, grads))


def assert_no_further_from_the_truth(function, reference, differentiable, rest=()):
    doubles = with_gradients(reference, [x.double() for x in differentiable], [x.double() for x in rest])
    rivals = with_gradients(reference, differentiable, rest)
    for value, rival, truth in zip(with_gradients(function, differentiable, rest), rivals, doubles, strict=True):
        assert value.dtype == rival.dtype
        assert value.shape == rival.shape
        error, rival_error = (value.double() - truth).norm(), (rival.double() - truth).norm()
        assert error <= rival_error + TOLERANCE[value.dtype] * truth.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "HQ", "HKV", "S", "D"), [(1, 1, 1, 1, 2), (2, 4, 2, 7, 16), (1, 3, 1, 5, 80), (2, 33, 3, 3, 64)]
)
def test_rotary(B, HQ, HKV, S, D, dtype, device):
    torch.manual_seed(0)
    # As the projections leave them: tokens before heads.
    q, k = (torch.randn(B, S, H, D, device=device).to(dtype).transpose(1, 2) for H in (HQ, HKV))
    for rows in {1, B}:
        for halves in ("same", "different"):
            rest = angles(rows, S, D, device, dtype, halves)
            assert_no_further_from_the_truth(rotary, rotary_reference, (q, k), rest)


@pytest.mark.parametrize("strided", [False, True])
def test_rotary_of_which_one_is_unused(strided, device):
    """What is not used has no gradient, rather than one of zeros that everything before it multiplies."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, 5, H, 8, device=device).transpose(1, 2) for H in (4, 2))
    rest = angles(2, 5, 8, device, torch.float32)
    for used, unused in ((0, 1), (1, 0)):
        both = [x.detach().requires_grad_() for x in (q, k)]
        made = [f(*both, *rest)[used] for f in (rotary, rotary_reference)]
        d_out = torch.randn_like(made[0])
        d_out = d_out.transpose(2, 3).contiguous().transpose(2, 3) if strided else d_out
        found, wanted = (torch.autograd.grad(x, both, d_out, allow_unused=True) for x in made)
        assert found[unused] is None
        torch.testing.assert_close(found[used], wanted[used])


def test_rotary_of_other_strides(device):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 6, 8, device=device), torch.randn(2, 8, 6, 2, device=device).transpose(1, 3)
    cos, sin = angles(2, 12, 8, device, torch.float32)
    assert_no_further_from_the_truth(rotary, rotary_reference, (q, k), (cos[:, ::2], sin[:, ::2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (7, 257), (2, 3, 1024), (5, 2048)])
def test_silu_mul(shape, dtype, device):
    torch.manual_seed(0)
    gate, up = ((torch.randn(shape, device=device) * 3).to(dtype) for _ in range(2))
    assert_no_further_from_the_truth(silu_mul, silu_mul_reference, (gate, up))


def test_silu_mul_extremes(device):
    gate = torch.tensor([-1e4, -90.0, -0.0, 0.0, 90.0, 1e4], device=device)
    assert_no_further_from_the_truth(silu_mul, silu_mul_reference, (gate, torch.randn(6, device=device)))


def test_silu_mul_of_other_strides(device):
    torch.manual_seed(0)
    gate, up = torch.randn(6, 8, device=device).t(), torch.randn(8, 12, device=device)[:, ::2]
    assert_no_further_from_the_truth(silu_mul, silu_mul_reference, (gate, up))


def test_empty(device):
    assert silu_mul(torch.empty(0, 5, device=device), torch.empty(0, 5, device=device)).shape == (0, 5)
    empty = torch.empty(1, 2, 0, 8, device=device)
    assert rotary(empty, empty, *(torch.empty(1, 0, 8, device=device),) * 2)[0].shape == (1, 2, 0, 8)


def test_ops_are_registered_well(device):
    q, k = (torch.randn(2, H, 5, 8, device=device) for H in (4, 2))
    cos, sin = angles(2, 5, 8, device, torch.float32)
    gate, up = (torch.randn(4, 16, device=device) for _ in range(2))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.cggr_kernels.rotary.default, (q, k, cos, sin, False), test_utils=tests)
    torch.library.opcheck(torch.ops.cggr_kernels.silu_mul.default, (gate, up), test_utils=tests)
    torch.library.opcheck(torch.ops.cggr_kernels.silu_mul_gradient.default, (gate, up, up), test_utils=tests)


def test_compiles_whole(device, compiler):
    q, k = (torch.randn(2, H, 5, 8, device=device) for H in (4, 2))
    rest = angles(2, 5, 8, device, torch.float32)
    compiled = torch.compile(
        lambda q, k, cos, sin: silu_mul(*(x.sum(1) for x in rotary(q, k, cos, sin))), fullgraph=True, backend=compiler
    )
    torch.testing.assert_close(compiled(q, k, *rest), silu_mul(*(x.sum(1) for x in rotary(q, k, *rest))))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"q": (2, 4, 5)}, ValueError, "q must have 4 dimensions"),
        ({"k": (2, 2, 6, 8)}, ValueError, "D even, got"),
        ({"cos": (3, 5, 8)}, ValueError, r"cos and sin must be \[2 or 1, 5, 8\]"),
        ({"q": (2, 4, 5, 7), "k": (2, 2, 5, 7)}, ValueError, "D even"),
    ],
)
def test_bad_shapes_are_named(change, error, said, device):
    shapes = {"q": (2, 4, 5, 8), "k": (2, 2, 5, 8), "cos": (2, 5, 8), "sin": (2, 5, 8)} | change
    with pytest.raises(error, match=said):
        rotary(**{name: torch.randn(shape, device=device) for name, shape in shapes.items()})


def test_bad_gates_are_named(device):
    gate = torch.randn(2, 3, device=device)
    with pytest.raises(ValueError, match="the same shape and dtype"):
        silu_mul(gate, gate[:1])
    with pytest.raises(TypeError, match="gate must be float32"):
        silu_mul(gate.long(), gate)
