"""Five statistics of each row of logits, in one pass over it."""

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Finite stand-in for -inf in exponents: 2^LOWEST is 0 and 0 * LOWEST is 0, where 0 * -inf would be NaN.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def _softcapped(x, inner, HAS_SOFTCAP: tl.constexpr):
    """tanh(x * inner) with a softcap, else ``x``: the logits without their outer factor, which ``unit`` contains."""
    x = x.to(tl.float32)
    if HAS_SOFTCAP:
        x = 2.0 * tl.sigmoid(2.0 * inner * x) - 1.0
    return x


@triton.jit
def _load(ptr, column, end, inner, HAS_SOFTCAP: tl.constexpr):
    x = _softcapped(tl.load(ptr + column, mask=column < end, other=-float("inf")), inner, HAS_SOFTCAP)
    if HAS_SOFTCAP:
        x = tl.where(column < end, x, -float("inf"))
    return x


@triton.jit
def _excluding(x, column, target):
    return tl.where(column == target, -float("inf"), x)


@triton.jit
def _exponent(x, unit, reference, CLAMP: tl.constexpr):
    d = x * unit - reference[:, None]
    if CLAMP:
        # NaN must propagate, so that a bad logit shows in the statistics.
        d = tl.maximum(d, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    return d


@triton.jit
def _accumulate(x0, x1, x2, x3, chunk, unit, reference, z, s, c, first, second, best, CLAMP: tl.constexpr):
    """Add a chunk of four tiles [LANES, WIDTH] to the running values of each lane.

    z = sum 2^d, s = sum 2^d * d, c = sum 4^d with d = x * unit - reference; ``first`` and ``second`` are the two
    largest of the chunks' maxima, ``best`` the chunk of the first. One thread holds a lane's row of a tile, so these
    reductions need no other thread.
    """
    largest = tl.max(tl.maximum(tl.maximum(x0, x1), tl.maximum(x2, x3)), 1)
    second = tl.maximum(second, tl.minimum(first, largest))
    best = tl.where(largest > first, chunk, best)
    first = tl.maximum(first, largest)
    new_reference = tl.maximum(first * unit, LOWEST)
    shift = reference - new_reference
    alpha = tl.exp2(shift)
    d0 = _exponent(x0, unit, new_reference, CLAMP)
    d1 = _exponent(x1, unit, new_reference, CLAMP)
    d2 = _exponent(x2, unit, new_reference, CLAMP)
    d3 = _exponent(x3, unit, new_reference, CLAMP)
    e0 = tl.exp2(d0)
    e1 = tl.exp2(d1)
    e2 = tl.exp2(d2)
    e3 = tl.exp2(d3)
    s = alpha * (s + z * shift) + tl.sum(((e0 * d0 + e1 * d1) + e2 * d2) + e3 * d3, 1)
    z = alpha * z + tl.sum((e0 + e1) + (e2 + e3), 1)
    c = alpha * alpha * c + tl.sum(((e0 * e0 + e1 * e1) + e2 * e2) + e3 * e3, 1)
    return new_reference, z, s, c, first, second, best


@triton.jit
def _read_row(
    row_ptr,
    body_ptr,
    start,
    V,
    target,
    unit,
    inner,
    CLAMP: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    PEEL: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """The running values of each lane after the whole row except the target."""
    TILE: tl.constexpr = LANES * WIDTH
    within = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    # -inf occurs only in the tail, where it would turn the entropy into NaN, and in logits, for which the caller
    # checks.
    none = tl.full([LANES, WIDTH], -float("inf"), tl.float32)
    reference = tl.full([LANES], LOWEST, tl.float32)
    z = tl.zeros([LANES], tl.float32)
    s = tl.zeros([LANES], tl.float32)
    c = tl.zeros([LANES], tl.float32)
    first = tl.full([LANES], -float("inf"), tl.float32)
    second = first
    best = tl.zeros([LANES], tl.int32)
    if PEEL:
        head = _load(row_ptr, within, tl.minimum(start, V), inner, HAS_SOFTCAP)
        if HAS_TARGETS:
            head = _excluding(head, within, target)
        reference, z, s, c, first, second, best = _accumulate(
            head, none, none, none, -1, unit, reference, z, s, c, first, second, best, True
        )
    # From here on columns count from ``start``.
    size = tl.maximum(V - start, 0)
    place = (target - start).to(tl.int32)
    full = size // (4 * TILE)
    for chunk in range(0, full):
        offset = chunk * (4 * TILE)
        x0 = _softcapped(tl.load(body_ptr + offset + within), inner, HAS_SOFTCAP)
        x1 = _softcapped(tl.load(body_ptr + offset + TILE + within), inner, HAS_SOFTCAP)
        x2 = _softcapped(tl.load(body_ptr + offset + 2 * TILE + within), inner, HAS_SOFTCAP)
        x3 = _softcapped(tl.load(body_ptr + offset + 3 * TILE + within), inner, HAS_SOFTCAP)
        if HAS_TARGETS:
            here = place - offset
            if (here >= 0) & (here < 4 * TILE):
                # Not -inf, which would need the clamp.
                x0 = tl.where(within == here, LOWEST, x0)
                x1 = tl.where(within == here - TILE, LOWEST, x1)
                x2 = tl.where(within == here - 2 * TILE, LOWEST, x2)
                x3 = tl.where(within == here - 3 * TILE, LOWEST, x3)
        reference, z, s, c, first, second, best = _accumulate(
            x0, x1, x2, x3, chunk, unit, reference, z, s, c, first, second, best, CLAMP
        )
    offset = full * (4 * TILE)
    if offset < size:
        x0 = _load(body_ptr, offset + within, size, inner, HAS_SOFTCAP)
        x1 = _load(body_ptr, offset + TILE + within, size, inner, HAS_SOFTCAP)
        x2 = _load(body_ptr, offset + 2 * TILE + within, size, inner, HAS_SOFTCAP)
        x3 = _load(body_ptr, offset + 3 * TILE + within, size, inner, HAS_SOFTCAP)
        if HAS_TARGETS:
            here = place - offset
            x0 = _excluding(x0, within, here)
            x1 = _excluding(x1, within, here - TILE)
            x2 = _excluding(x2, within, here - 2 * TILE)
            x3 = _excluding(x3, within, here - 3 * TILE)
        reference, z, s, c, first, second, best = _accumulate(
            x0, x1, x2, x3, full, unit, reference, z, s, c, first, second, best, True
        )
    return reference, z, s, c, first, second, best


@triton.jit
def _two_largest(
    logits_ptr,
    start,
    V,
    target,
    inner,
    first,
    second,
    best,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """The second largest is either in the best chunk, which is read again, or the maximum of the second-best chunk."""
    lane = tl.arange(0, LANES)
    top = tl.max(first, 0)
    winner = tl.argmax(first, 0)
    runner_up = tl.max(tl.where(lane == winner, second, first), 0)
    chunk = tl.max(tl.where(lane == winner, best, -1), 0)
    tile = tl.arange(0, 4)[:, None]
    column = tl.arange(0, WIDTH)[None, :] + winner * WIDTH
    column = tl.where(chunk < 0, column, start + (chunk * 4 + tile) * (LANES * WIDTH) + column)
    end = tl.where(chunk < 0, tl.where(tile == 0, tl.minimum(start, V), 0), V)
    x = _load(logits_ptr, column, end, inner, HAS_SOFTCAP)
    x = tl.where(column == target, -float("inf"), x)
    is_top = x == top
    several = tl.sum(tl.sum(is_top.to(tl.int32), 1), 0) > 1
    rest = tl.max(tl.max(tl.where(is_top, -float("inf"), x), 1), 0)
    return top, tl.maximum(runner_up, tl.where(several, top, rest))


@triton.jit
def difficulty_kernel(
    logits_ptr,
    targets_ptr,
    out_ptr,
    row_stride,
    out_stride,
    V,
    ignore_index,
    unit,
    inner,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    PEEL: tl.constexpr,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
):
    """One program per row; online softmax, so the row is read once. ``out`` is [5, N].

    The sums leave out the target until the end: sum p^2 - 2 p_y + 1 cancels completely as p_y nears 1, but it equals
    sum_others p^2 + (sum_others p)^2.
    """
    row = tl.program_id(0).to(tl.int64)
    target = -1
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row)
        if target == ignore_index:
            for field in tl.static_range(5):
                tl.store(out_ptr + field * out_stride + row, 0.0)
            return
    begin = row * row_stride
    row_ptr = logits_ptr + begin
    body_ptr = row_ptr
    start = 0
    if PEEL:
        # Columns to the next multiple of WIDTH elements, from where loads are 16 bytes wide again.
        aligned = (begin + WIDTH - 1) // WIDTH * WIDTH
        start = (aligned - begin).to(tl.int32)
        # A separate pointer: derived from the row's start, it would not be known to the compiler as aligned.
        body_ptr = logits_ptr + aligned
    reference, z, s, c, first, second, best = _read_row(
        row_ptr, body_ptr, start, V, target, unit, inner, False, HAS_SOFTCAP, HAS_TARGETS, PEEL, WIDTH, LANES
    )
    # A logit of -inf made its entropy term 0 * -inf: repeat with the clamp, which costs time.
    if (tl.sum((s != s).to(tl.int32), 0) > 0) & (tl.sum((z != z).to(tl.int32), 0) == 0):
        reference, z, s, c, first, second, best = _read_row(
            row_ptr, body_ptr, start, V, target, unit, inner, True, HAS_SOFTCAP, HAS_TARGETS, PEEL, WIDTH, LANES
        )
    top, runner_up = _two_largest(row_ptr, start, V, target, inner, first, second, best, HAS_SOFTCAP, WIDTH, LANES)

    x_y = -float("inf")
    if HAS_TARGETS:
        in_range = (target >= 0) & (target < V)
        x_y = tl.load(row_ptr + target, mask=in_range, other=float("nan"))
        x_y = _softcapped(x_y, inner, HAS_SOFTCAP)
        runner_up = tl.maximum(runner_up, tl.minimum(top, x_y))
        top = tl.maximum(top, x_y)
    joint = tl.maximum(tl.max(reference, 0), x_y * unit)
    shift = tl.maximum(reference - joint, LOWEST)
    alpha = tl.exp2(shift)
    s = tl.sum(alpha * (s + z * shift), 0)
    z = tl.sum(alpha * z, 0)
    c = tl.sum(alpha * alpha * c, 0)
    nll = 0.0
    gradnorm = 0.0
    if HAS_TARGETS:
        others = z
        d_y = tl.maximum(x_y * unit - joint, LOWEST, propagate_nan=tl.PropagateNan.ALL)
        e_y = tl.exp2(d_y)
        z += e_y
        s += e_y * d_y
        # Not d_y: an impossible target has an infinite loss, not a large finite one.
        nll = LN2 * (tl.log2(z) - (x_y * unit - joint))
        nll = tl.where(nll < 0.0, 0.0, nll)
        gradnorm = tl.sqrt(c + others * others) / z
    entropy = LN2 * (tl.log2(z) - s / z)
    e_top = tl.exp2(top * unit - joint)
    tl.store(out_ptr + row, tl.where(entropy < 0.0, 0.0, entropy))
    tl.store(out_ptr + out_stride + row, e_top / z)
    # Subtract first: the difference is exactly 0 when the two tie.
    tl.store(out_ptr + 2 * out_stride + row, (e_top - tl.exp2(runner_up * unit - joint)) / z)
    tl.store(out_ptr + 3 * out_stride + row, nll)
    tl.store(out_ptr + 4 * out_stride + row, gradnorm)
