import triton
import triton.language as tl

from cggr_kernels.routed_attention_details._visible import capped, key_range, visible


@triton.jit
def _query_gradient(
    dq,
    q,
    d_out,
    lse,
    delta,
    k_ptr,
    v_ptr,
    stride_ks,
    stride_vs,
    segment_ptr,
    position,
    query_segment,
    start,
    end,
    S,
    unit,
    inner,
    window,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SEGMENT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add dS @ K over the keys [start, end); the factor ``scale`` is left to the caller."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k_tile = n[:, None] * stride_ks + d[None, :]
    v_tile = n[:, None] * stride_vs + d[None, :]
    for offset in range(start, end, BLOCK_N):
        key = offset + n
        k_block = k_ptr + tl.cast(offset, tl.int64) * stride_ks
        v_block = v_ptr + tl.cast(offset, tl.int64) * stride_vs
        if MASKED:
            load = (key < S)[:, None] & (d < D)[None, :]
            k = tl.load(k_block + k_tile, mask=load, other=0.0)
            v = tl.load(v_block + v_tile, mask=load, other=0.0)
        elif D < BLOCK_D:
            k = tl.load(k_block + k_tile, mask=(d < D)[None, :], other=0.0)
            v = tl.load(v_block + v_tile, mask=(d < D)[None, :], other=0.0)
        else:
            k = tl.load(k_block + k_tile)
            v = tl.load(v_block + v_tile)
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION)
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
        dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if HAS_SOFTCAP:
            ds = ds * (1.0 - raw * raw)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def routed_attention_query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
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
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
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
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Same programs as the forward kernel; also leaves delta = sum(out * d_out) of each row for the key gradient."""
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
    start, full, end = key_range(
        position, query_segment, row_ok, segment_ptr, S, window, HAS_SEGMENT, HAS_WINDOW, BLOCK_N, 1024
    )

    load = row_ok[:, None] & (d < D)[None, :]
    q_row = b * stride_qb + slot.to(tl.int64) * stride_qk + head * stride_qh
    q = tl.load(q_ptr + q_row[:, None] + d[None, :], mask=load, other=0.0)
    out_row = ((b * K + slot) * HKV * G + head) * D
    d_out = tl.load(d_out_ptr + out_row[:, None] + d[None, :], mask=load, other=0.0)
    out = tl.load(out_ptr + out_row[:, None] + d[None, :], mask=load, other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    statistic_row = tl.program_id(1).to(tl.int64) * K * G + row
    tl.store(delta_ptr + statistic_row, delta, mask=row_ok)
    lse = tl.load(lse_ptr + statistic_row, mask=row_ok, other=float("inf"))
    k_ptr += b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + kv_head.to(tl.int64) * stride_vh
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if not HAS_SEGMENT and not HAS_WINDOW:
        dq = _query_gradient(
            dq,
            q,
            d_out,
            lse,
            delta,
            k_ptr,
            v_ptr,
            stride_ks,
            stride_vs,
            segment_ptr,
            position,
            query_segment,
            start,
            full,
            S,
            unit,
            inner,
            window,
            D,
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
        k_ptr,
        v_ptr,
        stride_ks,
        stride_vs,
        segment_ptr,
        position,
        query_segment,
        full,
        end,
        S,
        unit,
        inner,
        window,
        D,
        True,
        HAS_SEGMENT,
        HAS_WINDOW,
        HAS_SOFTCAP,
        PRECISION,
        BLOCK_N,
        BLOCK_D,
    )
    tl.store(dq_ptr + out_row[:, None] + d[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=load)


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
    """Slots [first, last) that may see a key of the block, and the first slot from which on all see all of it."""
    first = K
    last = 0
    full = 0
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
        first = tl.minimum(first, tl.min(tl.where(sees, slot, K), 0))
        last = tl.maximum(last, tl.max(tl.where(sees, slot + 1, 0), 0))
        full = tl.maximum(full, tl.max(tl.where((position < highest_key) & (slot < K), slot + 1, 0), 0))
    return first, last, full


@triton.jit
def _key_gradient(
    dk,
    dv,
    k,
    v,
    key,
    key_segment,
    key_ok,
    q_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    position_ptr,
    segment_ptr,
    stride_qk,
    stride_qh,
    stride_ok,
    start,
    end,
    K,
    S,
    unit,
    inner,
    window,
    G: tl.constexpr,
    D: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SEGMENT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add dS^T @ Q and P^T @ dO over the query rows [start, end); the factor ``scale`` of dK is left to the caller."""
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    for offset in range(start, end, BLOCK_M):
        row = offset + m
        row_ok = row < K * G
        slot = row // G
        load = row_ok[:, None] & (d < D)[None, :]
        q_row = slot.to(tl.int64) * stride_qk + (row % G) * stride_qh
        q = tl.load(q_ptr + q_row[:, None] + d[None, :], mask=load, other=0.0)
        lse = tl.load(lse_ptr + row, mask=row_ok, other=float("inf"))
        raw = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if HAS_SOFTCAP:
            raw = capped(raw, inner)
        p = tl.exp2(raw * unit - lse[None, :])
        if MASKED:
            position = tl.load(position_ptr + slot, mask=row_ok, other=-1).to(tl.int32)
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
        out_row = slot.to(tl.int64) * stride_ok + (row % G) * D
        d_out = tl.load(d_out_ptr + out_row[:, None] + d[None, :], mask=load, other=0.0)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        delta = tl.load(delta_ptr + row, mask=row_ok, other=0.0)
        ds = p * (dp - delta[None, :])
        if HAS_SOFTCAP:
            ds = ds * (1.0 - raw * raw)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def routed_attention_key_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    segment_ptr,
    d_out_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    stride_qb,
    stride_qk,
    stride_qh,
    stride_kb,
    stride_ks,
    stride_kh,
    stride_vb,
    stride_vs,
    stride_vh,
    K,
    S,
    HKV,
    scale,
    unit,
    inner,
    window,
    G: tl.constexpr,
    D: tl.constexpr,
    KEPT_ONLY: tl.constexpr,
    HAS_SEGMENT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program per BLOCK_N keys of one key head, over the query rows that may see them.

    With KEPT_ONLY the keys are those at the query positions, gathered and scattered by position; else all of them.
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
    first, last, full = _slot_range(
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
    if HAS_SEGMENT or HAS_WINDOW:
        full = end

    d = tl.arange(0, BLOCK_D)
    load = key_ok[:, None] & (d < D)[None, :]
    k_ptr += b * stride_kb + kv_head.to(tl.int64) * stride_kh
    v_ptr += b * stride_vb + kv_head.to(tl.int64) * stride_vh
    k = tl.load(k_ptr + key.to(tl.int64)[:, None] * stride_ks + d[None, :], mask=load, other=0.0)
    v = tl.load(v_ptr + key.to(tl.int64)[:, None] * stride_vs + d[None, :], mask=load, other=0.0)
    head = kv_head.to(tl.int64) * G
    q_ptr += b * stride_qb + head * stride_qh
    d_out_ptr += (b * K * HKV * G + head) * D
    lse_ptr += tl.program_id(1).to(tl.int64) * K * G
    delta_ptr += tl.program_id(1).to(tl.int64) * K * G
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
        q_ptr,
        d_out_ptr,
        lse_ptr,
        delta_ptr,
        position_ptr,
        segment_ptr,
        stride_qk,
        stride_qh,
        HKV * G * D,
        start,
        tl.minimum(full, end),
        K,
        S,
        unit,
        inner,
        window,
        G,
        D,
        True,
        HAS_SEGMENT,
        HAS_WINDOW,
        HAS_SOFTCAP,
        PRECISION,
        BLOCK_M,
        BLOCK_D,
    )
    if not HAS_SEGMENT and not HAS_WINDOW:
        dk, dv = _key_gradient(
            dk,
            dv,
            k,
            v,
            key,
            key_segment,
            key_ok,
            q_ptr,
            d_out_ptr,
            lse_ptr,
            delta_ptr,
            position_ptr,
            segment_ptr,
            stride_qk,
            stride_qh,
            HKV * G * D,
            full,
            end,
            K,
            S,
            unit,
            inner,
            window,
            G,
            D,
            False,
            HAS_SEGMENT,
            HAS_WINDOW,
            HAS_SOFTCAP,
            PRECISION,
            BLOCK_M,
            BLOCK_D,
        )
    key_row = ((b * S + key) * HKV + kv_head) * D
    tl.store(dk_ptr + key_row[:, None] + d[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=load)
    tl.store(dv_ptr + key_row[:, None] + d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=load)
