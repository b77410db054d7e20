"""Gradients of keys and values."""

import triton
import triton.language as tl

from cggr_kernels.routed_attention_details._visible import capped, visible


@triton.jit
def _slot_range(
    position_ptr,
    segment_ptr,
    lowest_key,
    highest_key,
    lowest_segment,
    highest_segment,
    K,
    S,
    window,
    HAS_SEGMENT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Slots [first, last) that may see a key of the block; those in [full, other) see all of it."""
    first = K
    last = 0
    full = 0
    other = K
    for offset in range(0, K, CHUNK):
        slot = offset + tl.arange(0, CHUNK)
        position = tl.load(position_ptr + slot, mask=slot < K, other=-1).to(tl.int32)
        position = tl.minimum(position, S - 1)
        sees = position >= lowest_key
        if HAS_WINDOW:
            sees = sees & (position - highest_key < window)
        if HAS_SEGMENT:
            segment = tl.load(segment_ptr + position, mask=position >= 0, other=-1).to(tl.int32)
            sees = sees & (segment >= lowest_segment) & (segment <= highest_segment)
            apart = (segment != highest_segment) & (position >= highest_key) & (slot < K)
            other = tl.minimum(other, tl.min(tl.where(apart, slot, K), 0))
        first = tl.minimum(first, tl.min(tl.where(sees, slot, K), 0))
        last = tl.maximum(last, tl.max(tl.where(sees, slot + 1, 0), 0))
        full = tl.maximum(full, tl.max(tl.where((position < highest_key) & (slot < K), slot + 1, 0), 0))
    return first, last, full, other


@triton.jit
def _key_gradient(
    dk,
    dv,
    k,
    v,
    key,
    key_segment,
    key_ok,
    q_desc,
    d_out_desc,
    b,
    kv_head,
    lse_ptr,
    delta_ptr,
    position_ptr,
    segment_ptr,
    start,
    end,
    gap_at,
    gap,
    K,
    S,
    unit,
    inner,
    window,
    G: tl.constexpr,
    TILE_G: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SEGMENT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add dS^T @ Q and P^T @ dO over the query rows [start, end), skipping ``gap`` rows from ``gap_at`` on.

    The factor ``scale`` of dK is left to the caller.
    With STAGES, the two products of a block start together and the statistics are also loaded ahead; without, fewer
    registers are needed.
    """
    m = tl.arange(0, BLOCK_M)
    for step in tl.range(start, end - gap, BLOCK_M, num_stages=STAGES):
        offset = step
        if MASKED and HAS_SEGMENT:
            offset = step + tl.where(step >= gap_at, gap, 0)
        row = offset + m
        q = q_desc.load([b, kv_head, offset // TILE_G, 0, 0]).reshape(BLOCK_M, BLOCK_D)
        d_out = d_out_desc.load([b, kv_head, offset // TILE_G, 0, 0]).reshape(BLOCK_M, BLOCK_D)
        # Rows past the last one exist, with lse = inf. Both statistics initialise the accumulator of a product: as
        # operands after it, they would take registers that this loop does not have.
        lse = tl.load(lse_ptr + row)
        d_p = tl.broadcast_to(-tl.load(delta_ptr + row)[None, :], (BLOCK_N, BLOCK_M))
        if HAS_SOFTCAP:
            raw = capped(tl.dot(k, tl.trans(q), input_precision=PRECISION), inner)
        else:
            raw = tl.broadcast_to((lse * (-1.0 / unit))[None, :], (BLOCK_N, BLOCK_M))
            raw = tl.dot(k, tl.trans(q), raw, input_precision=PRECISION)
        if STAGES is not None:
            d_p = tl.dot(v, tl.trans(d_out), d_p, input_precision=PRECISION)
        p = tl.exp2(raw * unit - lse[None, :]) if HAS_SOFTCAP else tl.exp2(raw * unit)
        if MASKED:
            position = tl.load(position_ptr + row // G, mask=row < K * G, other=-1).to(tl.int32)
            position = tl.minimum(position, S - 1)
            query_segment = position
            if HAS_SEGMENT:
                query_segment = tl.load(segment_ptr + position, mask=position >= 0, other=-1).to(tl.int32)
            seen = visible(
                position[None, :],
                query_segment[None, :],
                key[:, None],
                key_segment[:, None],
                key_ok[:, None],
                window,
                HAS_SEGMENT,
                HAS_WINDOW,
            )
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        if STAGES is None:
            d_p = tl.dot(v, tl.trans(d_out), d_p, input_precision=PRECISION)
        ds = p * d_p
        if HAS_SOFTCAP:
            ds = ds * (1.0 - raw * raw)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def routed_attention_key_gradient_kernel(
    q_desc,
    k_ptr,
    v_ptr,
    position_ptr,
    segment_ptr,
    d_out_desc,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
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
    TILE_G: tl.constexpr,
    D: tl.constexpr,
    KEPT_ONLY: tl.constexpr,
    HAS_SEGMENT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per BLOCK_N keys of one key head, over the query rows that may see them.

    The descriptors have shape [B, HKV, K * G / TILE_G, TILE_G, D], in which query rows are contiguous. With KEPT_ONLY,
    the keys are those at the query positions, gathered and scattered by position; otherwise all keys.
    """
    b = (tl.program_id(1) // HKV).to(tl.int64)
    kv_head = tl.program_id(1) % HKV
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    position_ptr += b * K
    segment_ptr += b * S
    key = n
    if KEPT_ONLY:
        key = tl.load(position_ptr + n, mask=n < K, other=-1).to(tl.int32)
    key_ok = (key >= 0) & (key < S)
    key_segment = key
    lowest_segment = 0
    highest_segment = 0
    if HAS_SEGMENT:
        key_segment = tl.load(segment_ptr + key, mask=key_ok, other=-1).to(tl.int32)
        lowest_segment = tl.min(tl.where(key_segment >= 0, key_segment, 2147483647), 0)
        highest_segment = tl.max(key_segment, 0)
    first, last, full, other = _slot_range(
        position_ptr,
        segment_ptr,
        tl.min(tl.where(key_ok, key, S), 0),
        tl.max(tl.where(key_ok, key, -1), 0),
        lowest_segment,
        highest_segment,
        K,
        S,
        window,
        HAS_SEGMENT,
        HAS_WINDOW,
        1024,
    )
    start = first * G // BLOCK_M * BLOCK_M
    end = last * G
    full = tl.maximum((full * G + BLOCK_M - 1) // BLOCK_M * BLOCK_M, start)
    rest = end
    if HAS_SEGMENT:
        one_segment = (tl.min(tl.where(key_ok, key_segment, 2147483647), 0) == highest_segment) & (highest_segment >= 0)
        rest = tl.where(one_segment, tl.minimum(other, last) * G // BLOCK_M * BLOCK_M, 0)
    if HAS_WINDOW:
        full = end
        rest = end
    full = tl.minimum(full, end)
    rest = tl.maximum(rest, full)

    d = tl.arange(0, BLOCK_D)
    load = key_ok[:, None] & (d < D)[None, :]
    k_ptr += b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + kv_head.to(tl.int64) * stride_vh
    k = tl.load(k_ptr + key.to(tl.int64)[:, None] * stride_ks + d[None, :], mask=load, other=0.0)
    v = tl.load(v_ptr + key.to(tl.int64)[:, None] * stride_vs + d[None, :], mask=load, other=0.0)
    lse_ptr += tl.program_id(1).to(tl.int64) * lse_rows
    delta_ptr += tl.program_id(1).to(tl.int64) * delta_rows
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dk, dv = _key_gradient(
        dk,
        dv,
        k,
        v,
        key,
        key_segment,
        key_ok,
        q_desc,
        d_out_desc,
        b.to(tl.int32),
        kv_head,
        lse_ptr,
        delta_ptr,
        position_ptr,
        segment_ptr,
        start,
        end if HAS_SEGMENT else full,
        full,
        rest - full if HAS_SEGMENT else 0,
        K,
        S,
        unit,
        inner,
        window,
        G,
        TILE_G,
        True,
        HAS_SEGMENT,
        HAS_WINDOW,
        HAS_SOFTCAP,
        PRECISION,
        STAGES,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    if not HAS_WINDOW:
        dk, dv = _key_gradient(
            dk,
            dv,
            k,
            v,
            key,
            key_segment,
            key_ok,
            q_desc,
            d_out_desc,
            b.to(tl.int32),
            kv_head,
            lse_ptr,
            delta_ptr,
            position_ptr,
            segment_ptr,
            full,
            rest,
            rest,
            0,
            K,
            S,
            unit,
            inner,
            window,
            G,
            TILE_G,
            False,
            HAS_SEGMENT,
            HAS_WINDOW,
            HAS_SOFTCAP,
            PRECISION,
            STAGES,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
        )
    key_row = ((b * S + key) * HKV + kv_head) * D
    tl.store(dk_ptr + key_row[:, None] + d[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=load)
    tl.store(dv_ptr + key_row[:, None] + d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=load)
