"""The experts' matrix products over sorted rows, and those of their backward."""

import triton
import triton.language as tl

from cggr_kernels.moe_details._dispatch import SEGMENT


@triton.jit
def _place(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Row and column of a tile, GROUP_M rows at a time, so that concurrent tiles share operands in the cache."""
    width = GROUP_M * num_n
    first = tile // width * GROUP_M
    size = tl.minimum(num_m - first, GROUP_M)
    return first + tile % width % size, tile % width // size


@triton.jit
def _halves(x):
    """The left and the right half of the columns of ``x``, without moving data."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def up_kernel(
    x_desc,
    w_desc,
    z_desc,
    h_desc,
    tile_expert_ptr,
    tiles_ptr,
    P,
    I: tl.constexpr,
    H: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Gate and up projection of the sorted rows, and their SwiGLU: h = silu(gate) * up.

    ``x`` [P, H], ``w`` [2E, I, H], ``h`` [P, I]; with SAVE, gate and up are also written to ``z`` [2P, I].
    """
    num_m = tl.load(tiles_ptr) * (SEGMENT // BLOCK_M)
    num_n: tl.constexpr = (I + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=FLATTEN):
        m, n = _place(tile, num_m, num_n, GROUP_M)
        row, column = m * BLOCK_M, n * BLOCK_N
        expert = tl.load(tile_expert_ptr + row // SEGMENT)
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in range(0, H, BLOCK_K):
            x = x_desc.load([row, k])
            w = w_desc.load([2 * expert, column, k]).reshape(2 * BLOCK_N, BLOCK_K)
            acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
        gate, up = _halves(acc)
        h = gate * tl.sigmoid(gate) * up
        h_desc.store([row, column], h.to(h_desc.dtype))
        if SAVE:
            z_desc.store([row, column], gate.to(z_desc.dtype))
            z_desc.store([P + row, column], up.to(z_desc.dtype))


@triton.jit
def row_product_kernel(
    a_desc,
    w_desc,
    out_desc,
    tile_expert_ptr,
    tiles_ptr,
    P,
    N: tl.constexpr,
    K: tl.constexpr,
    PLANES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """``out[row] = Σ_plane a[plane, row] @ w[expert of row, plane]``, for the sorted rows.

    ``a`` [PLANES · P, K], ``out`` [P, N]; ``w`` is [E · PLANES, K, N], or with TRANSPOSED [E · PLANES, N, K].
    """
    num_m = tl.load(tiles_ptr) * (SEGMENT // BLOCK_M)
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    steps: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=FLATTEN):
        m, n = _place(tile, num_m, num_n, GROUP_M)
        row, column = m * BLOCK_M, n * BLOCK_N
        expert = tl.load(tile_expert_ptr + row // SEGMENT)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(PLANES * steps):
            plane, k = step // steps, step % steps * BLOCK_K
            a = a_desc.load([plane * P + row, k])
            if TRANSPOSED:
                w = w_desc.load([PLANES * expert + plane, column, k]).reshape(BLOCK_N, BLOCK_K).T
            else:
                w = w_desc.load([PLANES * expert + plane, k, column]).reshape(BLOCK_K, BLOCK_N)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
        left, right = _halves(acc)
        out_desc.store([row, column], left.to(out_desc.dtype))
        out_desc.store([row, column + BLOCK_N // 2], right.to(out_desc.dtype))


@triton.jit
def group_product_kernel(
    a_desc,
    b_desc,
    out_desc,
    segment_ptr,
    P,
    E: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PLANES: tl.constexpr,
    PRECISION: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Gradients of weights: ``out[expert, plane] = a[plane, rows of expert].T @ b[rows of expert]``, or zeros.

    ``a`` [PLANES · P, M], ``b`` [P, N], ``out`` [E · PLANES, M, N].
    """
    num_m: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    num_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), E * PLANES * num_m * num_n, PROGRAMS, flatten=FLATTEN):
        group = tile // (num_m * num_n)
        m, n = _place(tile % (num_m * num_n), num_m, num_n, GROUP_M)
        expert, plane = group // PLANES, group % PLANES
        first = tl.load(segment_ptr + expert)
        last = tl.load(segment_ptr + expert + 1)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for row in range(first, last, BLOCK_K):
            a = a_desc.load([plane * P + row, m * BLOCK_M])
            b = b_desc.load([row, n * BLOCK_N])
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
        left, right = _halves(acc)
        row, column = m * BLOCK_M, n * BLOCK_N
        out_desc.store([group, row, column], left.to(out_desc.dtype).reshape(1, BLOCK_M, BLOCK_N // 2))
        column += BLOCK_N // 2
        out_desc.store([group, row, column], right.to(out_desc.dtype).reshape(1, BLOCK_M, BLOCK_N // 2))
