"""Attention of kept queries to full-length keys, with gradients to all keys or to the kept ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cggr_kernels._checks import check_device, check_first_derivatives, check_float, check_index
from cggr_kernels._library import register
from cggr_kernels._routed_attention_launch import (
    fake_forward,
    fake_key_gradient,
    fake_query_gradient,
    launch_forward,
    launch_key_gradient,
    launch_query_gradient,
)

MAX_HEAD_DIM = 256
KEY_GRADIENTS = ("all", "kept")


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor q_position, Tensor? segment"
_NUMBERS = "int? window, float? softcap, float scale"
_forward = register(
    f"routed_attention({_INPUTS}, {_NUMBERS}) -> (Tensor, Tensor)",
    launch_forward,
    fake_forward,
)
_query_gradient = register(
    f"routed_attention_query_gradient({_INPUTS}, Tensor out, Tensor d_out, Tensor lse, {_NUMBERS}) -> (Tensor, Tensor)",
    launch_query_gradient,
    fake_query_gradient,
)
_key_gradient = register(
    f"routed_attention_key_gradient({_INPUTS}, Tensor d_out, Tensor lse, Tensor delta, {_NUMBERS}, bool kept_only)"
    " -> (Tensor, Tensor)",
    launch_key_gradient,
    fake_key_gradient,
)


class _RoutedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_position: Tensor,
        segment: Tensor | None,
        window: int | None,
        softcap: float | None,
        scale: float,
        kept_only: bool,
    ) -> Tensor:
        out, lse = _forward(q, k, v, q_position, segment, window, softcap, scale)
        ctx.save_for_backward(q, k, v, q_position, segment, out, lse)
        ctx.numbers = (window, softcap, scale)
        ctx.kept_only = kept_only
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivatives()
        q, k, v, q_position, segment, out, lse = ctx.saved_tensors
        d_out = d_out.contiguous()
        dq, delta = _query_gradient(q, k, v, q_position, segment, out, d_out, lse, *ctx.numbers)
        dk = dv = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dk, dv = _key_gradient(q, k, v, q_position, segment, d_out, lse, delta, *ctx.numbers, ctx.kept_only)
        return dq, dk, dv, None, None, None, None, None, None


def _check(q: Tensor, k: Tensor, v: Tensor, q_position: Tensor, segment: Tensor | None) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_float(name, tensor, 4)
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, got {tensor.dtype} and {q.dtype}; cast one of them")
    B, K, H, D = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"k and v must be [B, S, Hkv, D] with the B and D of q [B, K, H, D], got {shapes}")
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"the heads of q must be a multiple of those of k, got {H} and {k.shape[2]}")
    if K and not k.shape[1]:
        raise ValueError(
            f"k must have at least one key for the queries of q, got k {tuple(k.shape)} and q {tuple(q.shape)}"
        )
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"the head dimension of q must be 1 to {MAX_HEAD_DIM}, got {D}")
    check_index("q_position", q_position, (B, K))
    if segment is not None:
        check_index("segment", segment, (B, k.shape[1]))
    check_device(q=q, k=k, v=v, q_position=q_position, segment=segment)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_position: Tensor,
    segment: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    key_gradient: str = "all",
) -> Tensor:
    r"""Attention of kept queries to full-length keys; differentiable in ``q``, ``k`` and ``v``.

    A query at position ``t`` sees key ``s`` if ``s <= t``; with ``window``, if also ``t - s < window``; with
    ``segment``, if also both are in the same segment and it is not negative. Blocks of keys that no query of a block
    can see are not read, and grouped heads share the keys they load. The softmax is the tiled online one of
    FlashAttention (Dao, https://arxiv.org/abs/2307.08691); the backward pass recomputes it and uses no atomics, so
    results are bitwise reproducible.

    Args:
        q: Kept queries, shape ``[B, K, H, D]``, float32, float16 or bfloat16, ``D`` at most 256; any strides.
        k: Keys of all tokens, shape ``[B, S, Hkv, D]``, ``H`` a multiple of ``Hkv``, same dtype as ``q``.
        v: Values of all tokens, same shape and dtype as ``k``.
        q_position: Position of each query among the keys, shape ``[B, K]``, int64, in ``[0, S)``. Any order is correct;
            ascending rows skip the most work.
        segment: Segment of each key, for documents packed into a row: shape ``[B, S]``, int64, negative for padding.
        window: Maximum number of keys a query sees, itself included; ``None`` for no limit.
        softcap: Scores become ``softcap * tanh(score / softcap)``; ``None`` for none.
        scale: Positive factor on the scores; ``D ** -0.5`` by default.
        key_gradient: ``"all"`` computes the gradients of all keys and values; ``"kept"`` only those at ``q_position``,
            with zeros elsewhere, which is cheaper (the positions of a row must then be distinct).

    Returns:
        Shape ``[B, K, H, D]``, same dtype as ``q``, contiguous; zeros for queries that see no key.

    Raises:
        TypeError: If a dtype is not accepted or the dtypes differ.
        ValueError: If shapes or devices do not match, or a number is out of range.

    Example:
        >>> q = torch.randn(1, 2, 4, 64, device="cuda", dtype=torch.bfloat16)
        >>> kv = torch.randn(1, 8, 2, 64, device="cuda", dtype=torch.bfloat16)
        >>> routed_attention(q, kv, kv, torch.tensor([[3, 7]], device="cuda")).shape
        torch.Size([1, 2, 4, 64])
    """
    _check(q, k, v, q_position, segment)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")
    if key_gradient not in KEY_GRADIENTS:
        raise ValueError(f"key_gradient must be one of {KEY_GRADIENTS}, got {key_gradient!r}")
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    segment = None if segment is None else segment.contiguous()
    return _RoutedAttention.apply(
        q, k, v, q_position.contiguous(), segment, window, softcap, scale, key_gradient == "kept"
    )
