import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Finite stand-in for -inf in exponents: 2^LOWEST is 0 and 0 * LOWEST is 0, where 0 * -inf would be NaN.
LOWEST: tl.constexpr = tl.constexpr(-1.0e30)


@triton.jit
def _top2(first, second, x):
    return tl.maximum(first, x), tl.maximum(second, tl.minimum(first, x))


@triton.jit
def _exponent(x, unit, reference):
    # NaN must survive the clamp, so that a bad logit shows in the statistics.
    return tl.maximum(x * unit - reference[:, None], LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _absorb(x0, x1, x2, x3, unit, reference, z, s, c, first, second):
    """Four tiles [LANES, WIDTH] into the running sums of each lane; base-2 exponents relative to ``reference``.

    z = sum 2^d, s = sum 2^d * d, c = sum 4^d with d = x * unit - reference. A lane's row of the tile lies in one
    thread, so these reductions touch no other thread.
    """
    first, second = _top2(first, second, x0)
    first, second = _top2(first, second, x1)
    first, second = _top2(first, second, x2)
    first, second = _top2(first, second, x3)
    new_reference = tl.maximum(tl.max(first, 1) * unit, LOWEST)
    shift = reference - new_reference
    alpha = tl.exp2(shift)
    d0 = _exponent(x0, unit, new_reference)
    d1 = _exponent(x1, unit, new_reference)
    d2 = _exponent(x2, unit, new_reference)
    d3 = _exponent(x3, unit, new_reference)
    e0 = tl.exp2(d0)
    e1 = tl.exp2(d1)
    e2 = tl.exp2(d2)
    e3 = tl.exp2(d3)
    s = alpha * (s + z * shift) + tl.sum(((e0 * d0 + e1 * d1) + e2 * d2) + e3 * d3, 1)
    z = alpha * z + tl.sum((e0 + e1) + (e2 + e3), 1)
    c = alpha * alpha * c + tl.sum(((e0 * e0 + e1 * e1) + e2 * e2) + e3 * e3, 1)
    return new_reference, z, s, c, first, second


@triton.jit
def _squash(x, inner, HAS_SOFTCAP: tl.constexpr):
    """tanh(x * inner) with a softcap, else ``x``: the logits without their outer factor, which is in ``unit``."""
    x = x.to(tl.float32)
    if HAS_SOFTCAP:
        x = 2.0 * tl.sigmoid(2.0 * inner * x) - 1.0
    return x


@triton.jit
def _load(ptr, column, end, inner, HAS_SOFTCAP: tl.constexpr):
    x = _squash(tl.load(ptr + column, mask=column < end, other=-float("inf")), inner, HAS_SOFTCAP)
    if HAS_SOFTCAP:
        x = tl.where(column < end, x, -float("inf"))
    return x


@triton.jit
def _without(x, column, target):
    return tl.where(column == target, -float("inf"), x)


@triton.jit
def difficulty_kernel(
    logits_ptr,
    targets_ptr,
    out_ptr,
    row_stride,
    N,
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

    The target stays out of the sums until the end: sum p^2 - 2 p_y + 1 loses every digit as p_y nears 1, but it is
    sum_others p^2 + (sum_others p)^2.
    """
    row = tl.program_id(0).to(tl.int64)
    target = ignore_index
    if HAS_TARGETS:
        target = tl.load(targets_ptr + row)
        if target == ignore_index:
            for field in tl.static_range(5):
                tl.store(out_ptr + field * N + row, 0.0)
            return

    TILE: tl.constexpr = LANES * WIDTH
    lane = tl.arange(0, LANES)
    within = lane[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    row_ptr = logits_ptr + row * row_stride
    start = 0
    if PEEL:
        # Columns to the next multiple of WIDTH elements, from where loads are 16 bytes wide again.
        begin = row * row_stride
        aligned = (begin + WIDTH - 1) // WIDTH * WIDTH
        start = tl.minimum(aligned - begin, V).to(tl.int32)
        row_ptr = logits_ptr + aligned
    size = V - start
    # From here on columns count from ``start``.
    place = (target - start).to(tl.int32)

    none = tl.full([LANES, WIDTH], -float("inf"), tl.float32)
    first = none
    second = none
    reference = tl.full([LANES], LOWEST, tl.float32)
    z = tl.zeros([LANES], tl.float32)
    s = tl.zeros([LANES], tl.float32)
    c = tl.zeros([LANES], tl.float32)
    if PEEL:
        head = _load(logits_ptr + row * row_stride, within, start, inner, HAS_SOFTCAP)
        if HAS_TARGETS:
            head = _without(head, within, place + start)
        reference, z, s, c, first, second = _absorb(head, none, none, none, unit, reference, z, s, c, first, second)
    full = size // (4 * TILE) * (4 * TILE)
    for offset in range(0, full, 4 * TILE):
        x0 = _squash(tl.load(row_ptr + offset + within), inner, HAS_SOFTCAP)
        x1 = _squash(tl.load(row_ptr + offset + TILE + within), inner, HAS_SOFTCAP)
        x2 = _squash(tl.load(row_ptr + offset + 2 * TILE + within), inner, HAS_SOFTCAP)
        x3 = _squash(tl.load(row_ptr + offset + 3 * TILE + within), inner, HAS_SOFTCAP)
        if HAS_TARGETS:
            here = place - offset
            if (here >= 0) & (here < 4 * TILE):
                x0 = _without(x0, within, here)
                x1 = _without(x1, within, here - TILE)
                x2 = _without(x2, within, here - 2 * TILE)
                x3 = _without(x3, within, here - 3 * TILE)
        reference, z, s, c, first, second = _absorb(x0, x1, x2, x3, unit, reference, z, s, c, first, second)
    if full < size:
        x0 = _load(row_ptr, full + within, size, inner, HAS_SOFTCAP)
        x1 = _load(row_ptr, full + TILE + within, size, inner, HAS_SOFTCAP)
        x2 = _load(row_ptr, full + 2 * TILE + within, size, inner, HAS_SOFTCAP)
        x3 = _load(row_ptr, full + 3 * TILE + within, size, inner, HAS_SOFTCAP)
        if HAS_TARGETS:
            here = place - full
            x0 = _without(x0, within, here)
            x1 = _without(x1, within, here - TILE)
            x2 = _without(x2, within, here - 2 * TILE)
            x3 = _without(x3, within, here - 3 * TILE)
        reference, z, s, c, first, second = _absorb(x0, x1, x2, x3, unit, reference, z, s, c, first, second)

    lane_first = tl.max(first, 1)
    is_first = first == lane_first[:, None]
    # The largest of a lane may occur at several places of it: then it is the second largest too.
    lane_second = tl.max(tl.where(is_first, second, first), 1)
    lane_second = tl.where(tl.sum(is_first.to(tl.int32), 1) > 1, lane_first, lane_second)
    top = tl.max(lane_first, 0)
    winner = tl.argmax(lane_first, 0)
    runner_up = tl.max(tl.where(lane == winner, lane_second, lane_first), 0)

    x_y = -float("inf")
    if HAS_TARGETS:
        in_range = (target >= 0) & (target < V)
        x_y = tl.load(logits_ptr + row * row_stride + target, mask=in_range, other=float("nan"))
        x_y = _squash(x_y, inner, HAS_SOFTCAP)
        top, runner_up = _top2(top, runner_up, x_y)
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
        # Not d_y: an impossible target has a loss of infinity, not of a large number.
        nll = LN2 * (tl.log2(z) - (x_y * unit - joint))
        nll = tl.where(nll < 0.0, 0.0, nll)
        gradnorm = tl.sqrt(c + others * others) / z
    entropy = LN2 * (tl.log2(z) - s / z)
    confidence = tl.exp2(top * unit - joint) / z
    tl.store(out_ptr + row, tl.where(entropy < 0.0, 0.0, entropy))
    tl.store(out_ptr + N + row, confidence)
    tl.store(out_ptr + 2 * N + row, confidence - tl.exp2(runner_up * unit - joint) / z)
    tl.store(out_ptr + 3 * N + row, nll)
    tl.store(out_ptr + 4 * N + row, gradnorm)
