"""Attention of query rows to the keys they see."""

import triton
import triton.language as tl

from cggr_kernels.routed_attention_details._visible import capped, in_registers, key_range, visible


@triton.jit
def _attend(
    acc,
    total,
    peak,
    q,
    k_desc,
    v_desc,
    b,
    kv_head,
    segment_ptr,
    position,
    query_segment,
    start,
    end,
    gap_at,
    gap,
    S,
    unit,
    inner,
    window,
    MASKED: tl.constexpr,
    HAS_SEGMENT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add keys [start, end) to the running softmax, skipping ``gap`` keys from ``gap_at`` on.

    ``peak`` and the exponents are in base 2.
    """
    n = tl.arange(0, BLOCK_N)
    for step in range(start, end - gap, BLOCK_N):
        offset = step
        if MASKED and HAS_SEGMENT:
            offset = step + tl.where(step >= gap_at, gap, 0)
        key = offset + n
        k = k_desc.load([b, kv_head, offset, 0]).reshape(BLOCK_N, BLOCK_D)
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if HAS_SOFTCAP:
            raw = capped(raw, inner)
        if MASKED:
            key_segment = key
            if HAS_SEGMENT:
                key_segment = tl.load(segment_ptr + key, mask=key < S, other=-1).to(tl.int32)
            seen = visible(
                position[:, None],
                query_segment[:, None],
                key[None, :],
                key_segment[None, :],
                (key < S)[None, :],
                window,
                HAS_SEGMENT,
                HAS_WINDOW,
            )
            raw = tl.where(seen, raw, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(raw, 1) * unit)
        p = tl.exp2(raw * unit - new_peak[:, None])
        alpha = tl.exp2(peak - new_peak)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = v_desc.load([b, kv_head, offset, 0]).reshape(BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    return acc, total, peak


@triton.jit
def routed_attention_forward_kernel(
    q_ptr,
    k_desc,
    v_desc,
    position_ptr,
    segment_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qk,
    stride_qh,
    lse_rows,
    K,
    S,
    HKV,
    unit,
    inner,
    window,
    G: tl.constexpr,
    D: tl.constexpr,
    HAS_SEGMENT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HOLD_QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per BLOCK_M query rows of one key head.

    A row is one query head at one kept position, row = slot * G + head within the group: the heads of a group share the
    keys they load, and a block of rows spans G times fewer positions than a block of one head would.
    """
    # The last blocks see the most keys, so they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    b = (tl.program_id(1) // HKV).to(tl.int64)
    kv_head = tl.program_id(1) % HKV
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < K * G
    slot = row // G
    head = kv_head * G + row % G
    d = tl.arange(0, BLOCK_D)
    position = tl.load(position_ptr + b * K + slot, mask=row_ok, other=-1).to(tl.int32)
    position = tl.minimum(position, S - 1)
    query_segment = position
    segment_ptr += b * S
    if HAS_SEGMENT:
        query_segment = tl.load(segment_ptr + position, mask=position >= 0, other=-1).to(tl.int32)
    start, free, full, end = key_range(
        position, query_segment, row_ok, segment_ptr, S, window, HAS_SEGMENT, HAS_WINDOW, BLOCK_N, 1024
    )

    q_row = b * stride_qb + slot.to(tl.int64) * stride_qk + head * stride_qh
    q = tl.load(q_ptr + q_row[:, None] + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    if HOLD_QUERIES:
        q = in_registers(q, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Finite, so that rows that see no key get exponents of -inf rather than NaN.
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
    if not HAS_WINDOW:
        acc, total, peak = _attend(
            acc,
            total,
            peak,
            q,
            k_desc,
            v_desc,
            b.to(tl.int32),
            kv_head,
            segment_ptr,
            position,
            query_segment,
            free,
            full,
            full,
            0,
            S,
            unit,
            inner,
            window,
            False,
            HAS_SEGMENT,
            HAS_WINDOW,
            HAS_SOFTCAP,
            PRECISION,
            BLOCK_N,
            BLOCK_D,
        )
    acc, total, peak = _attend(
        acc,
        total,
        peak,
        q,
        k_desc,
        v_desc,
        b.to(tl.int32),
        kv_head,
        segment_ptr,
        position,
        query_segment,
        start if HAS_SEGMENT else full,
        end,
        free,
        full - free if HAS_SEGMENT else 0,
        S,
        unit,
        inner,
        window,
        True,
        HAS_SEGMENT,
        HAS_WINDOW,
        HAS_SOFTCAP,
        PRECISION,
        BLOCK_N,
        BLOCK_D,
    )
    sees = total > 0.0
    total = tl.where(sees, total, 1.0)
    out = acc / total[:, None]
    out_row = ((b * K + slot) * HKV * G + head) * D
    tl.store(
        out_ptr + out_row[:, None] + d[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & (d < D)[None, :],
    )
    lse = tl.where(sees, peak + tl.log2(total), 0.0)
    statistic_row = tl.program_id(1).to(tl.int64) * lse_rows + row
    tl.store(lse_ptr + statistic_row, tl.where(row_ok, lse, float("inf")))
