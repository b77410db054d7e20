"""Rows in float8 equal the reference's exactly."""

import os

import pytest
import torch

import cggr_kernels.quantize_rows as host
from cggr_core.fp8 import quantize_rows_reference, quantize_silu_mul_reference
from cggr_kernels.quantize_rows import quantize_rows
from cggr_kernels.quantize_silu_mul import quantize_silu_mul

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_rows(N, K, dtype, device):
    torch.manual_seed(0)
    return (torch.randn(N, K, device=device) * torch.logspace(-3, 3, N, device=device)[:, None]).to(dtype)


def assert_same(found, wanted):
    (rows, scale), (wanted_rows, wanted_scale) = found, wanted
    assert rows.dtype == torch.float8_e4m3fn
    assert rows.shape == wanted_rows.shape
    assert scale.equal(wanted_scale)
    there = certain(rows) & certain(wanted_rows)
    value, expected = (x.float()[there] for x in (rows, wanted_rows))
    if rows.device.type == "cuda":
        assert torch.equal(value, expected)
    else:  # Triton's interpreter rounds what is in the middle away from even
        torch.testing.assert_close(value, expected, rtol=0.13, atol=2**-9)


def certain(rows):
    """Where casts can be compared: Triton's interpreter halves numbers that round up to a power of two."""
    values = rows.float().abs()
    power_of_two = values == torch.exp2(values.log2().floor())
    return ~power_of_two if rows.device.type == "cpu" else torch.ones_like(power_of_two)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (3, 7), (2, 257), (5, 2048), (257, 16)])
def test_rows_are_those_of_the_reference(N, K, dtype, device):
    x = random_rows(N, K, dtype, device)
    assert_same(quantize_rows(x), quantize_rows_reference(x))


def test_rows_longer_than_a_block_are_read_twice(device, monkeypatch):
    monkeypatch.setattr(host, "_LONGEST", 64)
    for K in (65, 128, 300):
        x = random_rows(3, K, torch.float32, device)
        assert_same(quantize_rows(x), quantize_rows_reference(x))
        gate, up = x / x.abs().amax(1, keepdim=True) * 4, x.flip(1).contiguous()
        assert_close(quantize_silu_mul(gate, up), quantize_silu_mul_reference(gate, up))


def assert_close(found, wanted):
    # The sigmoid's last bit may be another, and a number that is then nearest to another e4m3 number.
    (rows, scale), (wanted_rows, wanted_scale) = found, wanted
    torch.testing.assert_close(scale, wanted_scale, rtol=1e-5, atol=0)
    there = certain(rows) & certain(wanted_rows)
    value, expected = ((x.float() * y)[there] for x, y in ((rows, scale), (wanted_rows, wanted_scale)))
    if rows.device.type == "cuda":
        assert ((value - expected).abs() > 1e-4 * expected.abs()).sum() <= 1 + 0.01 * value.numel()
    torch.testing.assert_close(value, expected, rtol=0.13, atol=float(wanted_scale.max()) * 2**-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "K"), [(1, 1), (2, 257), (5, 2048)])
def test_the_gated_product_is_quantised_as_its_reference_is(N, K, dtype, device):
    torch.manual_seed(0)
    gate, up = ((torch.randn(N, K, device=device) * 3).to(dtype) for _ in range(2))
    assert_close(quantize_silu_mul(gate, up), quantize_silu_mul_reference(gate, up))


def test_extremes(device):
    x = torch.tensor([[0.0, -0.0], [1e4, -1e-4], [-3e38, 1.0], [1e-38, -1e-38]], device=device)
    assert_same(quantize_rows(x), quantize_rows_reference(x))


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter casts NaN to numbers")
def test_what_is_no_number_stays_none(device):
    x = torch.tensor([[torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, 0.0]], device=device)
    rows, scale = quantize_rows(x)
    assert (rows.float() * scale).sum(1).isnan().all()


def test_other_strides_and_nothing(device):
    x = random_rows(6, 10, torch.float32, device)
    assert_same(quantize_rows(x.t()), quantize_rows_reference(x.t()))
    assert quantize_rows(torch.empty(0, 5, device=device))[1].shape == (0, 1)
    assert_same(
        quantize_rows(torch.empty(3, 0, device=device)), quantize_rows_reference(torch.empty(3, 0, device=device))
    )


def test_no_gradient_goes_through(device):
    x = torch.randn(2, 4, device=device, requires_grad=True)
    assert not quantize_rows(x)[1].requires_grad


def test_ops_are_registered_well_and_compile_whole(device, compiler):
    gate, up = (torch.randn(4, 16, device=device) for _ in range(2))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.cggr_kernels.quantize_rows.default, (gate,), test_utils=tests)
    torch.library.opcheck(torch.ops.cggr_kernels.quantize_silu_mul.default, (gate, up), test_utils=tests)
    compiled = torch.compile(lambda x: quantize_rows(x + 1)[1], fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(gate), quantize_rows(gate + 1)[1])


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        (torch.ones(2, 2, dtype=torch.float64), TypeError, "x must be float32, float16 or bfloat16"),
        (torch.ones(2), ValueError, "x must have 2 dimensions"),
    ],
)
def test_what_does_not_fit_is_named(x, error, said, device):
    with pytest.raises(error, match=said):
        quantize_rows(x.to(device))


def test_a_gate_of_another_shape_is_named(device):
    with pytest.raises(ValueError, match="gate and up must have one shape and dtype"):
        quantize_silu_mul(torch.ones(2, 2, device=device), torch.ones(2, 3, device=device))
