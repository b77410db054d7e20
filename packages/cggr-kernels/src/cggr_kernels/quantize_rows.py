"""Quantises rows to float8 (e4m3) with one scale per row, in one launch."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from cggr_kernels._checks import check_device, check_float
from cggr_kernels._library import register
from cggr_kernels.quantize_rows_details._quantize_rows import quantize_rows_kernel

_LARGEST = 448.0  # of e4m3
_SMALLEST = 1e-30  # below it, the factor on a row would overflow float32
_LONGEST = 16384  # numbers of a row that fit in registers; longer rows are read twice
_NUMBERS_OF_A_THREAD = 32


def launch_quantize(x: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantise the rows of ``x``, or of ``silu(x) * up``; both are contiguous ``[N, K]``."""
    quantised, scale = fake_quantize(x)
    N, K = x.shape
    if K == 0:
        return quantised, scale.fill_(_SMALLEST / _LARGEST)
    if N:
        BLOCK = min(triton.next_power_of_2(K), _LONGEST)
        quantize_rows_kernel[(N,)](
            x,
            up,
            quantised,
            scale,
            K,
            SMALLEST=_SMALLEST,
            LARGEST=_LARGEST,
            GATED=up is not None,
            WHOLE=BLOCK >= K,
            BLOCK=BLOCK,
            num_warps=max(1, min(16, BLOCK // (32 * _NUMBERS_OF_A_THREAD))),
        )
    return quantised, scale


def fake_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`launch_quantize` fills."""
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)


def _launch(x: Tensor) -> tuple[Tensor, Tensor]:
    return launch_quantize(x, None)


_quantize_rows = register("quantize_rows(Tensor x) -> (Tensor, Tensor)", _launch, fake_quantize)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise rows to float8_e4m3fn, each scaled so that its largest number becomes 448, the largest of e4m3.

    Args:
        x: ``[N, K]``, float32, float16 or bfloat16; no gradient goes through.

    Returns:
        float8_e4m3fn ``[N, K]``, and scales float32 ``[N, 1]`` with ``x ≈ rows * scale``. A row with a NaN or an
        infinity becomes NaN in a product.

    Raises:
        TypeError: If the dtype is not accepted.
        ValueError: If ``x`` does not have two dimensions, or is on a device that the kernels do not run on.

    Example:
        >>> rows, scale = quantize_rows(torch.tensor([[1.0, -3.5]], device="cuda"))
        >>> rows.tolist(), scale.item()
        ([[128.0, -448.0]], 0.0078125)
    """
    check_float("x", x, 2)
    check_device(x=x)
    return _quantize_rows(x.detach().contiguous())
