"""Rotary position embedding of queries and keys in one launch each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from cggr_kernels._checks import check_device, check_first_derivatives, check_float
from cggr_kernels._library import register
from cggr_kernels.rotary_details._rotary import rotary_kernel

_MOST_HEADS_AT_ONCE = 32


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    B, HQ, S, D = q.shape
    # Laid out with tokens before heads, as projections return them and attention takes them.
    q_out, k_out = (x.new_empty(B, S, x.shape[1], D).transpose(1, 2) for x in (q, k))
    if B * S == 0:
        return q_out, k_out
    cos, sin = (angle.expand(B, S, D) for angle in (cos, sin))
    rotary_kernel[(B * S,)](
        q,
        k,
        cos,
        sin,
        q_out,
        k_out,
        S,
        q.stride(0),
        q.stride(2),
        q.stride(1),
        k.stride(0),
        k.stride(2),
        k.stride(1),
        cos.stride(0),
        cos.stride(1),
        Q_HEADS=HQ,
        K_HEADS=k.shape[1],
        HALF=D // 2,
        BLOCK_H=min(triton.next_power_of_2(max(HQ, k.shape[1])), _MOST_HEADS_AT_ONCE),
        BLOCK_D=triton.next_power_of_2(D // 2),
        BACKWARD=backward,
        num_warps=4,
    )
    return q_out, k_out


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    B, _, S, D = q.shape
    q_out, k_out = (x.new_empty(B, S, x.shape[1], D).transpose(1, 2) for x in (q, k))
    return q_out, k_out


_rotary = register(
    "rotary(Tensor q, Tensor k, Tensor cos, Tensor sin, bool backward) -> (Tensor, Tensor)", _launch, _fake
)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        # Where queries or keys take no part in a loss, nothing before them should be multiplied by zeros.
        ctx.set_materialize_grads(False)
        return _rotary(q, k, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, d_q: Tensor | None, d_k: Tensor | None) -> tuple[Tensor | None, ...]:
        check_first_derivatives()
        given = d_q if d_q is not None else d_k
        if given is None:
            return None, None, None, None
        nothing = given[:, :0]
        of_q, of_k = (nothing if d is None else d if d.stride(-1) == 1 else d.contiguous() for d in (d_q, d_k))
        turned_q, turned_k = _rotary(of_q, of_k, *ctx.saved_tensors, True)
        return None if d_q is None else turned_q, None if d_k is None else turned_k, None, None


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    r"""Rotate queries and keys by the angles of their positions (rotary embedding, https://arxiv.org/abs/2104.09864).

    With ``x = [x1, x2]`` in halves: ``[x1 cos1 - x2 sin1, x2 cos2 + x1 sin2]``, in float32, rounded once.

    Args:
        q: ``[B, H, S, D]``, ``D`` even, float32, float16 or bfloat16; contiguous in the last dimension.
        k: ``[B, Hkv, S, D]``, same dtype as ``q``.
        cos: ``[B, S, D]`` or ``[1, S, D]``, without a gradient.
        sin: Same shape and strides as ``cos``.

    Returns:
        The rotated queries and keys, in the shapes of ``q`` and ``k``, laid out in memory with tokens before heads.

    Raises:
        TypeError: If a dtype is not accepted.
        ValueError: If shapes, strides or devices do not match.

    Example:
        >>> q, k = torch.randn(1, 4, 3, 8, device="cuda"), torch.randn(1, 2, 3, 8, device="cuda")
        >>> cos, sin = torch.ones(1, 3, 8, device="cuda"), torch.zeros(1, 3, 8, device="cuda")
        >>> torch.equal(rotary(q, k, cos, sin)[0], q)
        True
    """
    for name, x in (("q", q), ("k", k)):
        check_float(name, x, 4)
    for name, x in (("cos", cos), ("sin", sin)):
        check_float(name, x, 3)
    check_device(q=q, k=k, cos=cos, sin=sin)
    B, _, S, D = q.shape
    if q.dtype != k.dtype or k.shape[0] != B or k.shape[2:] != q.shape[2:] or D % 2:
        raise ValueError(
            f"q and k must be [B, H, S, D] and [B, Hkv, S, D] of one dtype, D even, got {tuple(q.shape)} {q.dtype} and "
            f"{tuple(k.shape)} {k.dtype}"
        )
    if cos.shape != sin.shape or cos.shape[0] not in (1, B) or tuple(cos.shape[1:]) != (S, D):
        raise ValueError(
            f"cos and sin must be [{B} or 1, {S}, {D}] to match q and k, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin require a gradient, but they are treated as constants; detach them")
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = cos.contiguous(), sin.contiguous()
    return _Rotary.apply(q, k, cos, sin)
