"""The product in the middle of a gated MLP, quantised to float8 rows for the matrix product that follows."""

from __future__ import annotations

from torch import Tensor

from cggr_kernels._checks import check_device, check_float
from cggr_kernels._library import register
from cggr_kernels.quantize_rows import fake_quantize, launch_quantize


def _fake(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return fake_quantize(gate)


_quantize_silu_mul = register("quantize_silu_mul(Tensor gate, Tensor up) -> (Tensor, Tensor)", launch_quantize, _fake)


def quantize_silu_mul(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise the rows of ``silu(gate) * up`` (SwiGLU, https://arxiv.org/abs/2002.05202) as ``quantize_rows`` does.

    The product is computed in float32 and rounded once, to e4m3; it is never written in another dtype.

    Args:
        gate: ``[N, K]``, float32, float16 or bfloat16; no gradient goes through.
        up: Same shape and dtype as ``gate``.

    Returns:
        float8_e4m3fn ``[N, K]``, and scales float32 ``[N, 1]``.

    Raises:
        TypeError: If a dtype is not accepted.
        ValueError: If shapes, dtypes or devices do not match.

    Example:
        >>> gate = torch.randn(2, 5, device="cuda")
        >>> quantize_silu_mul(gate, torch.ones_like(gate))[0].shape
        torch.Size([2, 5])
    """
    for name, tensor in (("gate", gate), ("up", up)):
        check_float(name, tensor, 2)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must have one shape and dtype, got {tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} "
            f"{up.dtype}"
        )
    check_device(gate=gate, up=up)
    return _quantize_silu_mul(gate.detach().contiguous(), up.detach().contiguous())
