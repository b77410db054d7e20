"""Matrix products in FP8 (e4m3), with one scale per row of both factors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from cggr_core.backends import has_fp8_products, register_reference, resolve

__all__ = [
    "fits",
    "product",
    "quantize_rows",
    "quantize_rows_reference",
    "quantize_silu_mul",
    "quantize_silu_mul_reference",
]

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
# Below this, the factor of a row would overflow float32.
SMALLEST = 1e-30
# Sizes must be multiples of this: products read 16 bytes at a time.
STEP = 16
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def fits(weight: Tensor) -> bool:
    """Whether ``weight`` ``[M, K]``, once quantised, can be a factor of :func:`product`."""
    plain = type(weight) in (torch.nn.Parameter, Tensor)  # not sharded, nor quantised by another library
    return plain and weight.dtype in _FLOATS and all(size % STEP == 0 for size in weight.shape)


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain-torch op ``quantize_rows``: rows as e4m3, each scaled so that its largest number is the largest of e4m3.

    Args:
        x: ``[N, K]``, float32, float16 or bfloat16.

    Returns:
        float8_e4m3fn ``[N, K]``, and the scales float32 ``[N, 1]`` with ``x ≈ rows * scale``. A row that has a NaN or
        an infinity becomes NaN in a product.
    """
    x = x.float()
    largest = x.abs().amax(1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)
    largest = largest.clamp(min=SMALLEST)
    # Divided by a tensor: with a number, torch multiplies by a reciprocal that is rounded already.
    most = torch.full_like(largest, LARGEST)
    return (x * (most / largest)).to(FP8), largest / most


def quantize_silu_mul_reference(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Plain-torch op ``quantize_silu_mul``: :func:`quantize_rows_reference` of ``silu(gate) * up`` in float32.

    Args:
        gate: ``[N, K]``, float32, float16 or bfloat16.
        up: The same.

    Returns:
        As of :func:`quantize_rows_reference`.
    """
    return quantize_rows_reference(silu(gate.float()) * up.float())


register_reference("quantize_rows", quantize_rows_reference)
register_reference("quantize_silu_mul", quantize_silu_mul_reference)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_rows_reference`, by a kernel if the device has FP8 products and a kernel is installed."""
    if has_fp8_products(x.device):
        return resolve("quantize_rows", x.device.type)(x)
    return quantize_rows_reference(x)


def quantize_silu_mul(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`quantize_silu_mul_reference`, by a kernel if the device has FP8 products and a kernel is installed."""
    if has_fp8_products(gate.device):
        return resolve("quantize_silu_mul", gate.device.type)(gate, up)
    return quantize_silu_mul_reference(gate, up)


def product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """``(x * x_scale) @ (weight * weight_scale).T + bias``, the factors as :func:`quantize_rows` gives them.

    A device without FP8 products multiplies the same numbers in float32: same error as FP8, but not its speed.

    Args:
        x: float8_e4m3fn ``[N, K]``, ``K`` a multiple of 16.
        x_scale: float32 ``[N, 1]``.
        weight: float8_e4m3fn ``[M, K]``, ``M`` a multiple of 16.
        weight_scale: float32 ``[M, 1]``.
        bias: ``[M]``, or ``None``.

    Returns:
        bfloat16 ``[N, M]``, the only output dtype that devices support for row-scaled products.

    Example:
        >>> x, weight = torch.randn(4, 32), torch.randn(16, 32)
        >>> error = product(*quantize_rows(x), *quantize_rows(weight)).float() - x @ weight.T
        >>> bool(error.norm() < 0.1 * (x @ weight.T).norm())
        True
    """
    if has_fp8_products(x.device):
        # Without fast accumulation (in 22 bits rather than 32), row-scaled products are slower than bfloat16.
        return torch._scaled_mm(
            x,
            weight.t(),
            scale_a=x_scale,
            scale_b=weight_scale.t(),
            bias=None if bias is None else bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    made = (x.float() @ weight.float().t()) * x_scale * weight_scale.t()
    return (made if bias is None else made + bias.float()).bfloat16()
