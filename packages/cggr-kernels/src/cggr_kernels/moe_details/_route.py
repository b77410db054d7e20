"""The best experts of each token, the statistics of a batch, and the gradient of both."""

import triton
import triton.language as tl


@triton.jit
def route_kernel(
    logits_ptr,
    bias_ptr,
    keep_ptr,
    weight_ptr,
    index_ptr,
    lse_ptr,
    partial_ptr,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_KEEP: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Softmax, the K best experts and their weights for BLOCK_T tokens, and the block's share of the statistics.

    ``partial`` is [blocks, 2E + 4] float32: sums of the probabilities [E], choices of each expert [E], squared
    log-sum-exps, entropies, routed tokens, bad tokens. ``lse`` is +inf where a token is not routed.
    """
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    wanted = t < T
    x = tl.load(logits_ptr + t[:, None] * E + e, mask=wanted[:, None] & (e < E), other=-float("inf")).to(tl.float32)
    if HAS_KEEP:
        wanted = wanted & (tl.load(keep_ptr + t, mask=wanted, other=0) != 0)
    peak = tl.max(x, 1)
    e_x = tl.exp(x - peak[:, None])
    z = tl.sum(e_x, 1)
    lse = peak + tl.log(z)
    # NaN compares false.
    sound = (lse > -float("inf")) & (lse < float("inf"))
    routed = wanted & sound
    p = tl.where(routed[:, None], e_x / z[:, None], 0.0)
    score = p
    if HAS_BIAS:
        score += tl.load(bias_ptr + e, mask=e < E, other=0.0)
    score = tl.where(p > 0, score, -float("inf"))
    weight = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    index = tl.full([BLOCK_T, BLOCK_K], -1, tl.int64)
    taken = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for choice in range(K):
        found = tl.max(score, 1) > -float("inf")
        best = tl.argmax(score, 1)
        hit = (e == best[:, None]) & found[:, None]
        here = (k == choice) & found[:, None]
        weight = tl.where(here, tl.sum(tl.where(hit, p, 0.0), 1)[:, None], weight)
        index = tl.where(here, best.to(tl.int64)[:, None], index)
        taken = tl.where(hit, 1.0, taken)
        score = tl.where(hit, -float("inf"), score)
    if NORMALISE:
        total = tl.sum(weight, 1)
        weight = weight / tl.where(total > 0, total, 1.0)[:, None]
    place = t[:, None] * K + k
    inside = (t < T)[:, None] & (k < K)
    tl.store(weight_ptr + place, weight, mask=inside)
    tl.store(index_ptr + place, index, mask=inside)
    tl.store(lse_ptr + t, tl.where(routed, lse, float("inf")), mask=t < T)
    lse = tl.where(routed, lse, 0.0)
    entropy = tl.sum(tl.where(p > 0, p * (lse[:, None] - x), 0.0), 1)
    partial_ptr += block * (2 * E + 4)
    tl.store(partial_ptr + e, tl.sum(p, 0), mask=e < E)
    tl.store(partial_ptr + E + e, tl.sum(taken, 0), mask=e < E)
    tl.store(partial_ptr + 2 * E, tl.sum(lse * lse, 0))
    tl.store(partial_ptr + 2 * E + 1, tl.sum(entropy, 0))
    tl.store(partial_ptr + 2 * E + 2, tl.sum(tl.where(routed, 1.0, 0.0), 0))
    tl.store(partial_ptr + 2 * E + 3, tl.sum(tl.where(wanted & (sound == 0), 1.0, 0.0), 0))


@triton.jit
def route_statistics_kernel(
    partial_ptr,
    balance_ptr,
    z_ptr,
    entropy_ptr,
    load_ptr,
    bad_ptr,
    slope_ptr,
    blocks,
    E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Losses and counts from the blocks' shares; one program.

    ``slope`` is [E + 1]: derivatives of the balance loss by one token's probabilities, and twice the reciprocal of the
    number of routed tokens.
    """
    e = tl.arange(0, BLOCK_E)
    tail = tl.arange(0, 4)
    # Summed over the blocks once, at the end: a reduction in each iteration would make warps wait for each other.
    p_sums = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    loads = tl.zeros([BLOCK_B, BLOCK_E], tl.int32)
    rests = tl.zeros([BLOCK_B, 4], tl.float32)
    for start in range(0, blocks, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        row_ptr = partial_ptr + b[:, None].to(tl.int64) * (2 * E + 4)
        mask = (b < blocks)[:, None] & (e < E)
        p_sums += tl.load(row_ptr + e, mask=mask, other=0.0)
        loads += tl.load(row_ptr + E + e, mask=mask, other=0.0).to(tl.int32)
        rests += tl.load(row_ptr + 2 * E + tail, mask=(b < blocks)[:, None], other=0.0)
    p_sum = tl.sum(p_sums, 0)
    load = tl.sum(loads, 0)
    rest = tl.sum(rests, 0)
    squares = tl.sum(tl.where(tail == 0, rest, 0.0), 0)
    entropy = tl.sum(tl.where(tail == 1, rest, 0.0), 0)
    tokens = tl.maximum(tl.sum(tl.where(tail == 2, rest, 0.0), 0), 1.0)
    share = load.to(tl.float32) / tl.maximum(tl.sum(load, 0), 1).to(tl.float32)
    slope = E * share / tokens
    tl.store(balance_ptr, tl.sum(slope * p_sum, 0))
    tl.store(z_ptr, squares / tokens)
    tl.store(entropy_ptr, entropy / tokens)
    tl.store(load_ptr + e, load.to(tl.int64), mask=e < E)
    tl.store(bad_ptr, tl.sum(tl.where(tail == 3, rest, 0.0), 0).to(tl.int64))
    tl.store(slope_ptr + e, slope, mask=e < E)
    tl.store(slope_ptr + E, 2.0 / tokens)


@triton.jit
def route_gradient_kernel(
    logits_ptr,
    lse_ptr,
    index_ptr,
    slope_ptr,
    d_weight_ptr,
    d_balance_ptr,
    d_z_ptr,
    d_logits_ptr,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Gradient of the weights and both losses with respect to the logits, for BLOCK_T tokens."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    inside = (t < T)[:, None] & (e < E)
    x = tl.load(logits_ptr + t[:, None] * E + e, mask=inside, other=-float("inf")).to(tl.float32)
    lse = tl.load(lse_ptr + t, mask=t < T, other=float("inf"))
    routed = lse < float("inf")
    lse = tl.where(routed, lse, 0.0)
    p = tl.where(routed[:, None], tl.exp(x - lse[:, None]), 0.0)
    d_chosen = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    taken = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for choice in range(K):
        best = tl.load(index_ptr + t * K + choice, mask=t < T, other=-1)
        upstream = tl.load(d_weight_ptr + t * K + choice, mask=t < T, other=0.0)
        hit = e == best[:, None]
        d_chosen = tl.where(hit, upstream[:, None], d_chosen)
        taken = tl.where(hit, p, taken)
    if NORMALISE:
        total = tl.sum(taken, 1)
        total = tl.where(total > 0, total, 1.0)
        mean = tl.sum(d_chosen * taken, 1) / total
        d_chosen = tl.where(taken > 0, (d_chosen - mean[:, None]) / total[:, None], 0.0)
    d_p = d_chosen + tl.load(d_balance_ptr) * tl.load(slope_ptr + e, mask=e < E, other=0.0)
    d_x = p * (d_p - tl.sum(p * d_p, 1)[:, None])
    d_x += p * (tl.load(d_z_ptr) * tl.load(slope_ptr + E) * lse)[:, None]
    tl.store(d_logits_ptr + t[:, None] * E + e, d_x.to(d_logits_ptr.dtype.element_ty), mask=inside)
