"""Block shapes, tensor descriptors and launches of the routed-attention kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cggr_kernels._library import shared_memory
from cggr_kernels.routed_attention_details._forward import routed_attention_forward_kernel
from cggr_kernels.routed_attention_details._key_gradient import routed_attention_key_gradient_kernel
from cggr_kernels.routed_attention_details._query_gradient import routed_attention_query_gradient_kernel

LOG2E = 1.4426950408889634


class Blocks(NamedTuple):
    """Shape of a kernel's programs (query rows, keys, warps, pipeline stages) and how it uses registers.

    ``hold`` keeps the queries in registers; ``eager`` starts both products of a key-gradient block together and loads
    statistics ahead; ``registers`` limits the registers of a thread.
    """

    m: int
    n: int
    warps: int
    stages: int
    hold: bool = False
    eager: bool = False
    registers: int | None = None


# Measured on an H200 (16-bit floats), for head dimensions up to the key. Fixed rather than tuned at run time: a first
# step compiles three kernels instead of twenty, and results do not depend on an autotuner's choice. The query rows of
# each table's kernels divide those of the table above, since each kernel reads the statistics of whole blocks.
FORWARD_BLOCKS = {64: Blocks(64, 128, 4, 2), 128: Blocks(64, 64, 4, 3, hold=True), 256: Blocks(128, 64, 8, 2)}
QUERY_GRADIENT_BLOCKS = {64: Blocks(64, 128, 4, 3), 128: Blocks(64, 64, 4, 3, hold=True), 256: Blocks(64, 32, 4, 3)}
KEY_GRADIENT_BLOCKS = {
    64: Blocks(64, 64, 4, 3, registers=168),
    128: Blocks(64, 64, 4, 2, eager=True),
    256: Blocks(64, 64, 8, 2, eager=True),
}
FLOAT32_BLOCKS = {64: Blocks(64, 32, 4, 1), 128: Blocks(32, 32, 4, 1), 256: Blocks(32, 16, 4, 1)}
# For GPUs before Hopper, which have less shared memory and take all operands of matrix products from registers.
SMALL_BLOCKS = {64: Blocks(64, 32, 4, 1), 128: Blocks(32, 32, 4, 1), 256: Blocks(16, 32, 4, 1)}
_MUCH_SHARED_MEMORY = 200 * 1024


def _blocks(table: dict[int, Blocks], q: Tensor) -> Blocks:
    """Blocks for a head dimension, dtype and device."""
    if shared_memory(q.device) < _MUCH_SHARED_MEMORY:
        table = SMALL_BLOCKS
    elif q.element_size() > 2:
        table = FLOAT32_BLOCKS
    return table[next(limit for limit in table if q.shape[-1] <= limit)]


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Descriptor of ``x``, or of a copy if ``x`` is not aligned to the 16 bytes that the GPU's copy engine needs."""
    step = 16 // x.element_size()
    if x.data_ptr() % 16 or any(stride == 0 or stride % step for stride in x.stride()[:-1]):
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % step)).contiguous()
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _key_descriptor(x: Tensor, blocks: Blocks) -> TensorDescriptor:
    """Blocks of keys or values of one head, from ``[B, S, Hkv, D]``."""
    return _descriptor(x.transpose(1, 2), [1, 1, blocks.n, _padded_dim(x)])


def _row_descriptor(x: Tensor, HKV: int, blocks: Blocks) -> tuple[TensorDescriptor, int]:
    """Blocks of query rows of one key head, from ``[B, K, H, D]``, and how many rows of a slot the blocks hold.

    A block is a box of slots and heads if the heads of a group are a power of two; else the rows are made contiguous.
    """
    B, K, H, D = x.shape
    tile = H // HKV
    x = x.unflatten(2, (HKV, tile)).transpose(1, 2)
    if tile & (tile - 1) or tile > blocks.m:
        x, tile = x.reshape(B, HKV, K * tile, 1, D), 1
    return _descriptor(x, [1, 1, blocks.m // tile, tile, _padded_dim(x)]), tile


def _statistics(table: dict[int, Blocks], q: Tensor, HKV: int) -> Tensor:
    """Uninitialized statistic of the query rows of each key head, with all rows of the last block that is launched."""
    B, K, H, _ = q.shape
    m = _blocks(table, q).m
    return q.new_empty(B, HKV, triton.cdiv(K * H // HKV, m) * m, dtype=torch.float32)


def _padded_dim(x: Tensor) -> int:
    return max(16, int(triton.next_power_of_2(x.shape[-1])))


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
        # Three tensor-core products per product: as accurate as float32, and several times faster.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
        "BLOCK_D": _padded_dim(q),
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "maxnreg": blocks.registers,
    }


def launch_forward(
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
            _key_descriptor(k, blocks),
            _key_descriptor(v, blocks),
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


def fake_forward(
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


def launch_query_gradient(
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
            _key_descriptor(k, blocks),
            _key_descriptor(v, blocks),
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


def fake_query_gradient(
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


def launch_key_gradient(
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
    # Rows that the kernel does not write: other tokens, or all of them if there are no queries.
    create = torch.zeros if kept_only or not q.numel() else torch.empty
    dk_BSHD = create(B, S, HKV, D, dtype=k.dtype, device=k.device)
    dv_BSHD = create(B, S, HKV, D, dtype=v.dtype, device=v.device)
    if q.numel():
        blocks = _blocks(KEY_GRADIENT_BLOCKS, q)
        q_rows, tile = _row_descriptor(q, HKV, blocks)
        d_out_rows, _ = _row_descriptor(d_out, HKV, blocks)
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


def fake_key_gradient(
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
