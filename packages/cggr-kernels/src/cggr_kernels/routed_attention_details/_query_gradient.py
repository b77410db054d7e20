"""Gradients of queries."""

import triton
import triton.language as tl

from cggr_kernels.routed_attention_details._visible import capped, in_registers, key_range, visible


@triton.jit
def _query_gradient(
    dq,
    q,
    d_out,
    lse,
    delta,
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
    """Add dS @ K over the keys [start, end), skipping ``gap`` keys from ``gap_at`` on.

    The factor ``scale`` is left to the caller.
    """
    n = tl.arange(0, BLOCK_N)
    for step in range(start, end - gap, BLOCK_N):
        offset = step
        if MASKED and HAS_SEGMENT:
            offset = step + tl.where(step >= gap_at, gap, 0)
        key = offset + n
        k = k_desc.load([b, kv_head, offset, 0]).reshape(BLOCK_N, BLOCK_D)
        v = v_desc.load([b, kv_head, offset, 0]).reshape(BLOCK_N, BLOCK_D)
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        if HAS_SOFTCAP:
            raw = capped(raw, inner)
        p = tl.exp2(raw * unit - lse[:, None])
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
            p = tl.where(seen, p, 0.0)
        ds = p * (dp - delta[:, None])
        if HAS_SOFTCAP:
            ds = ds * (1.0 - raw * raw)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def routed_attention_query_gradient_kernel(
    q_ptr,
    k_desc,
    v_desc,
    position_ptr,
    segment_ptr,
    out_ptr,
    d_out_ptr,
    lse_ptr,
    dq_ptr,
    delta_ptr,
    stride_qb,
    stride_qk,
    stride_qh,
    lse_rows,
    delta_rows,
    K,
    S,
    HKV,
    scale,
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
    """Same programs as the forward kernel; also stores delta = sum(out * d_out) of each row for the key gradient."""
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

    load = row_ok[:, None] & (d < D)[None, :]
    q_row = b * stride_qb + slot.to(tl.int64) * stride_qk + head * stride_qh
    q = tl.load(q_ptr + q_row[:, None] + d[None, :], mask=load, other=0.0)
    out_row = ((b * K + slot) * HKV * G + head) * D
    d_out = tl.load(d_out_ptr + out_row[:, None] + d[None, :], mask=load, other=0.0)
    out = tl.load(out_ptr + out_row[:, None] + d[None, :], mask=load, other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_ptr + tl.program_id(1).to(tl.int64) * delta_rows + row, delta)
    lse = tl.load(lse_ptr + tl.program_id(1).to(tl.int64) * lse_rows + row)
    if HOLD_QUERIES:
        q = in_registers(q, BLOCK_D)
        d_out = in_registers(d_out, BLOCK_D)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if not HAS_WINDOW:
        dq = _query_gradient(
            dq,
            q,
            d_out,
            lse,
            delta,
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
    dq = _query_gradient(
        dq,
        q,
        d_out,
        lse,
        delta,
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
    tl.store(dq_ptr + out_row[:, None] + d[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=load)
