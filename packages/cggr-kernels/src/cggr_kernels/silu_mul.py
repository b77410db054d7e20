"""The product in the middle of a gated MLP, ``silu(gate) * up``, in one launch each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from cggr_kernels._checks import FLOATS, check_device, check_first_derivatives
from cggr_kernels._library import register
from cggr_kernels.silu_mul_details._silu_mul import silu_mul_gradient_kernel, silu_mul_kernel

_BLOCK = 2048


def _forward_launch(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if out.numel():
        silu_mul_kernel[(triton.cdiv(out.numel(), _BLOCK),)](gate, up, out, out.numel(), BLOCK=_BLOCK, num_warps=8)
    return out


def _forward_fake(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _gradient_launch(gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = _forward_fake(gate, up), _forward_fake(gate, up)
    if gate.numel():
        grid = (triton.cdiv(gate.numel(), _BLOCK),)
        silu_mul_gradient_kernel[grid](gate, up, d_out, d_gate, d_up, gate.numel(), BLOCK=_BLOCK, num_warps=8)
    return d_gate, d_up


def _gradient_fake(gate: Tensor, up: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor]:
    return _forward_fake(gate, up), _forward_fake(gate, up)


_forward = register("silu_mul(Tensor gate, Tensor up) -> Tensor", _forward_launch, _forward_fake)
_gradient = register(
    "silu_mul_gradient(Tensor gate, Tensor up, Tensor d_out) -> (Tensor, Tensor)", _gradient_launch, _gradient_fake
)


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:
        check_first_derivatives()
        return _gradient(*ctx.saved_tensors, d_out.contiguous())


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (the middle of SwiGLU, https://arxiv.org/abs/2002.05202), in float32, rounded once.

    Args:
        gate: Any shape, float32, float16 or bfloat16.
        up: Same shape and dtype as ``gate``.

    Returns:
        The product, contiguous. Neither the activation nor its sigmoid is saved for the backward pass.

    Raises:
        TypeError: If a dtype is not accepted.
        ValueError: If shapes or devices do not match.

    Example:
        >>> gate = torch.randn(2, 5, device="cuda")
        >>> silu_mul(gate, torch.ones_like(gate)).shape
        torch.Size([2, 5])
    """
    for name, tensor in (("gate", gate), ("up", up)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must have the same shape and dtype, got {tuple(gate.shape)} {gate.dtype} and "
            f"{tuple(up.shape)} {up.dtype}"
        )
    check_device(gate=gate, up=up)
    return _SiluMul.apply(gate.contiguous(), up.contiguous())
