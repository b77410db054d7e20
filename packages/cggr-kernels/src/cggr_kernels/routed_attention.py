"""Attention of kept queries to full-length keys, with gradients to all keys or to the kept ones."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cggr_kernels._checks import check_device, check_float, check_index
from cggr_kernels._library import register
from cggr_kernels.routed_attention_details._forward import routed_attention_forward_kernel
from cggr_kernels.routed_attention_details._key_gradient import routed_attention_key_gradient_kernel
from cggr_kernels.routed_attention_details._query_gradient import routed_attention_query_gradient_kernel

LOG2E = 1.4426950408889634
MAX_HEAD_DIM = 256
KEY_GRADIENTS = ("all", "kept")


def routed_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_position: Tensor,
    segment: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Plain-torch twin of :func:`routed_attention`; the truth its tests compare with.

    Args:
        q: Shape ``[B, K, H, D]``.
        k: Shape ``[B, S, Hkv, D]``.
        v: Shape ``[B, S, Hkv, D]``.
        q_position: Shape ``[B, K]``, int64.
        segment: Shape ``[B, S]``, int64, or ``None``.
        window: Keys a query sees at most, or ``None``.
        softcap: Cap of the scores, or ``None``.
        scale: Factor of the scores, by default ``D ** -0.5``.

    Returns:
        Shape ``[B, K, H, D]``; queries that see no key give 0.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[2] // k.shape[2]
    kind = torch.promote_types(q.dtype, torch.float32)
    k_BSHD, v_BSHD = (x.to(kind).repeat_interleave(group, 2) for x in (k, v))
    scores_BHKS = torch.einsum("bkhd,bshd->bhks", q.to(kind), k_BSHD) * scale
    if softcap is not None:
        scores_BHKS = softcap * torch.tanh(scores_BHKS / softcap)
    key_S = torch.arange(k.shape[1], device=q.device)
    seen_BKS = key_S <= q_position[..., None]
    if window is not None:
        seen_BKS = seen_BKS & (q_position[..., None] - key_S < window)
    if segment is not None:
        own_BK1 = segment.gather(1, q_position)[..., None]
        seen_BKS = seen_BKS & (own_BK1 == segment[:, None]) & (own_BK1 >= 0)
    hidden_BHKS = ~seen_BKS[:, None]
    p_BHKS = scores_BHKS.masked_fill(hidden_BHKS, -torch.inf).softmax(-1).masked_fill(hidden_BHKS, 0)
    return torch.einsum("bhks,bshd->bkhd", p_BHKS, v_BSHD).to(q.dtype)


class Blocks(NamedTuple):
    """Shape of a kernel's programs: query rows, keys, warps, stages of the pipeline; and how it uses registers.

    ``hold`` keeps the queries in registers; ``eager`` starts both products of a key gradient's block together and loads
    statistics ahead; ``registers`` bounds those of a thread.
    """

    m: int
    n: int
    warps: int
    stages: int
    hold: bool = False
    eager: bool = False
    registers: int | None = None


# Measured on an H200 (16-bit floats); by head dimension up to the key. They are fixed, not tuned at run time: a first
# step compiles three kernels instead of twenty, and results do not depend on what a tuner happened to see.
# The query rows of a table's kernels divide those of the one above it: each reads the statistics of whole blocks.
FORWARD_BLOCKS = {64: Blocks(64, 128, 4, 2), 128: Blocks(64, 64, 4, 3, hold=True), 256: Blocks(128, 32, 8, 2)}
QUERY_GRADIENT_BLOCKS = {64: Blocks(64, 128, 4, 3), 128: Blocks(64, 64, 4, 3, hold=True), 256: Blocks(64, 32, 8, 2)}
KEY_GRADIENT_BLOCKS = {
    64: Blocks(64, 64, 4, 3, registers=168),
    128: Blocks(64, 64, 4, 2, eager=True),
    256: Blocks(32, 64, 8, 2),
}
FLOAT32_BLOCKS = {64: Blocks(64, 32, 4, 1), 128: Blocks(32, 32, 4, 1), 256: Blocks(32, 16, 4, 1)}
# For GPUs whose multiprocessors have less shared memory.
SMALL_BLOCKS = {64: Blocks(64, 32, 4, 1), 128: Blocks(32, 32, 4, 1), 256: Blocks(16, 32, 4, 1)}
_MUCH_SHARED_MEMORY = 160 * 1024


@functools.cache
def _has_much_shared_memory(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= _MUCH_SHARED_MEMORY


def _blocks(table: dict[int, Blocks], q: Tensor) -> Blocks:
    """Blocks for a head dimension, dtype and device."""
    if not _has_much_shared_memory(q.device):
        table = SMALL_BLOCKS
    elif q.element_size() > 2:
        table = FLOAT32_BLOCKS
    return table[next(limit for limit in table if q.shape[-1] <= limit)]


def _described(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Descriptor of ``x``, or of a copy where the copy engine of a GPU cannot address it: in steps of 16 bytes."""
    step = 16 // x.element_size()
    if x.data_ptr() % 16 or any(stride == 0 or stride % step for stride in x.stride()[:-1]):
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % step)).contiguous()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _described_keys(x: Tensor, blocks: Blocks) -> TensorDescriptor:
    """Blocks of keys or values of one head, from ``[B, S, Hkv, D]``."""
    return _described(x.transpose(1, 2), [1, 1, blocks.n, _padded_dim(x)])


def _described_rows(x: Tensor, HKV: int, blocks: Blocks) -> tuple[TensorDescriptor, int]:
    """Blocks of query rows of one key head, from ``[B, K, H, D]``, and how many rows of a slot the blocks hold.

    A block is a box of slots and heads if the heads of a group are a power of two; else the rows are made contiguous.
    """
    B, K, H, D = x.shape
    tile = H // HKV
    x = x.unflatten(2, (HKV, tile)).transpose(1, 2)
    if tile & (tile - 1) or tile > blocks.m:
        x, tile = x.reshape(B, HKV, K * tile, 1, D), 1
    return _described(x, [1, 1, blocks.m // tile, tile, _padded_dim(x)]), tile


def _statistics(table: dict[int, Blocks], q: Tensor, HKV: int) -> Tensor:
    """Uninitialized statistic of the query rows of each key head, with all rows of the last block that is launched."""
    B, K, H, _ = q.shape
    m = _blocks(table, q).m
    return q.new_empty(B, HKV, triton.cdiv(K * H // HKV, m) * m, dtype=torch.float32)


def _padded_dim(x: Tensor) -> int:
    return max(16, triton.next_power_of_2(x.shape[-1]))


def _arguments(
    q: Tensor,
    k: Tensor,
    segment: Tensor | None,
    window: int | None,
    softcap: float | None,
    scale: float,
    blocks: Blocks,
) -> dict[str, Any]:
    """Sizes, factors, compile-time flags and launch options that all three kernels share."""
    _, K, H, D = q.shape
    S, HKV = k.shape[1:3]
    return {
        "K": K,
        "S": S,
        "HKV": HKV,
        "unit": (scale if softcap is None else softcap) * LOG2E,
        "inner": 1.0 if softcap is None else scale / softcap,
        "window": 0 if window is None else window,
        "G": H // HKV,
        "D": D,
        "HAS_SEGMENT": segment is not None,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        # Three products of tensor cores for one: as close to the truth as float32 is, and several times faster.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "BLOCK_D": _padded_dim(q),
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "maxnreg": blocks.registers,
    }


def _launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_position: Tensor,
    segment: Tensor | None,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, K, H, D = q.shape
    HKV = k.shape[2]
    out_BKHD = torch.empty(B, K, H, D, dtype=q.dtype, device=q.device)
    lse_BHR = _statistics(FORWARD_BLOCKS, q, HKV)
    if q.numel():
        blocks = _blocks(FORWARD_BLOCKS, q)
        routed_attention_forward_kernel[(triton.cdiv(K * H // HKV, blocks.m), B * HKV)](
            q,
            _described_keys(k, blocks),
            _described_keys(v, blocks),
            q_position,
            q_position if segment is None else segment,
            out_BKHD,
            lse_BHR,
            *q.stride()[:3],
            lse_BHR.shape[2],
            HOLD_QUERIES=blocks.hold,
            **_arguments(q, k, segment, window, softcap, scale, blocks),
        )
    return out_BKHD, lse_BHR


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_position: Tensor,
    segment: Tensor | None,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _statistics(FORWARD_BLOCKS, q, k.shape[2])


def _launch_query_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_position: Tensor,
    segment: Tensor | None,
    out: Tensor,
    d_out: Tensor,
    lse: Tensor,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, K, H, D = q.shape
    HKV = k.shape[2]
    dq_BKHD = torch.empty(B, K, H, D, dtype=q.dtype, device=q.device)
    delta_BHR = _statistics(QUERY_GRADIENT_BLOCKS, q, HKV)
    if q.numel():
        blocks = _blocks(QUERY_GRADIENT_BLOCKS, q)
        routed_attention_query_gradient_kernel[(triton.cdiv(K * H // HKV, blocks.m), B * HKV)](
            q,
            _described_keys(k, blocks),
            _described_keys(v, blocks),
            q_position,
            q_position if segment is None else segment,
            out,
            d_out,
            lse,
            dq_BKHD,
            delta_BHR,
            *q.stride()[:3],
            lse.shape[2],
            delta_BHR.shape[2],
            scale=scale,
            HOLD_QUERIES=blocks.hold,
            **_arguments(q, k, segment, window, softcap, scale, blocks),
        )
    return dq_BKHD, delta_BHR


def _fake_query_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_position: Tensor,
    segment: Tensor | None,
    out: Tensor,
    d_out: Tensor,
    lse: Tensor,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), _statistics(QUERY_GRADIENT_BLOCKS, q, k.shape[2])


def _launch_key_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_position: Tensor,
    segment: Tensor | None,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    window: int | None,
    softcap: float | None,
    scale: float,
    kept_only: bool,
) -> tuple[Tensor, Tensor]:
    B, S, HKV, D = k.shape
    K = q.shape[1]
    # Rows that the kernel does not write: other tokens, or all of them where there is no query.
    create = torch.zeros if kept_only or not q.numel() else torch.empty
    dk_BSHD = create(B, S, HKV, D, dtype=k.dtype, device=k.device)
    dv_BSHD = create(B, S, HKV, D, dtype=v.dtype, device=v.device)
    if q.numel():
        blocks = _blocks(KEY_GRADIENT_BLOCKS, q)
        q_rows, tile = _described_rows(q, HKV, blocks)
        d_out_rows, _ = _described_rows(d_out, HKV, blocks)
        routed_attention_key_gradient_kernel[(triton.cdiv(K if kept_only else S, blocks.n), B * HKV)](
            q_rows,
            k,
            v,
            q_position,
            q_position if segment is None else segment,
            d_out_rows,
            lse,
            delta,
            dk_BSHD,
            dv_BSHD,
            *k.stride()[:3],
            *v.stride()[:3],
            lse.shape[2],
            delta.shape[2],
            scale=scale,
            TILE_G=tile,
            STAGES=blocks.stages if blocks.eager else None,
            KEPT_ONLY=kept_only,
            **_arguments(q, k, segment, window, softcap, scale, blocks),
        )
    return dk_BSHD, dv_BSHD


def _fake_key_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_position: Tensor,
    segment: Tensor | None,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    window: int | None,
    softcap: float | None,
    scale: float,
    kept_only: bool,
) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor q_position, Tensor? segment"
_NUMBERS = "int? window, float? softcap, float scale"
_forward = register(
    f"routed_attention({_INPUTS}, {_NUMBERS}) -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_query_gradient = register(
    f"routed_attention_query_gradient({_INPUTS}, Tensor out, Tensor d_out, Tensor lse, {_NUMBERS}) -> (Tensor, Tensor)",
    _launch_query_gradient,
    _fake_query_gradient,
)
_key_gradient = register(
    f"routed_attention_key_gradient({_INPUTS}, Tensor d_out, Tensor lse, Tensor delta, {_NUMBERS}, bool kept_only)"
    " -> (Tensor, Tensor)",
    _launch_key_gradient,
    _fake_key_gradient,
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
            raise TypeError(f"{name} is {tensor.dtype} and q is {q.dtype}; cast them to one dtype")
    B, K, H, D = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != D:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise ValueError(f"k and v must be [B, S, Hkv, D] with B and D of q [B, K, H, D], got {shapes}")
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"q has {H} heads, which must be a multiple of the {k.shape[2]} heads of k")
    if K and not k.shape[1]:
        raise ValueError(f"k has no keys, shape {tuple(k.shape)}, but q has queries, shape {tuple(q.shape)}")
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"q has head dimension {D}; accepted are 1 to {MAX_HEAD_DIM}")
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
    ``segment``, if also both are in the same segment, and that is not negative. Blocks of keys that no query of a block
    sees are not read, and grouped heads share the keys they load. The softmax is the tiled online one of FlashAttention
    (Dao, https://arxiv.org/abs/2307.08691); the backward pass recomputes it and uses no atomics, so that results repeat
    bit for bit.

    Args:
        q: Kept queries, shape ``[B, K, H, D]``, float32, float16 or bfloat16, ``D`` at most 256; any strides.
        k: Keys of all tokens, shape ``[B, S, Hkv, D]``, ``H`` a multiple of ``Hkv``, dtype of ``q``.
        v: Values of all tokens, shape and dtype of ``k``.
        q_position: Position of each query among the keys, shape ``[B, K]``, int64, in ``[0, S)``. Ascending rows skip
            the most work; any order is correct.
        segment: Segment of every key (documents packed into a row), shape ``[B, S]``, int64, negative for padding.
        window: Number of keys a query sees at most, itself included; ``None`` for all.
        softcap: Scores become ``softcap * tanh(score / softcap)``; ``None`` for none.
        scale: Factor of the scores, positive; by default ``D ** -0.5``.
        key_gradient: ``"all"``: gradients of all keys and values. ``"kept"``: of those at ``q_position`` alone, zero
            elsewhere, which costs less (queries are then distinct positions).

    Returns:
        Shape ``[B, K, H, D]``, dtype of ``q``, contiguous. Queries that see no key give 0.

    Raises:
        TypeError: If a dtype is not accepted or the dtypes differ.
        ValueError: If shapes, devices or numbers do not fit.

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
