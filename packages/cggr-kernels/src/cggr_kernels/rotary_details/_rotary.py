"""Kernel of rotary embeddings, forward and backward."""

import triton
import triton.language as tl


@triton.jit
def _rotate(
    x_ptr,
    out_ptr,
    head_stride,
    out_head_stride,
    first_cos,
    second_cos,
    first_sin,
    second_sin,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All heads of one token: pairs (x1, x2) to (x1 c1 - x2 s1, x2 c2 + x1 s2)."""
    column = tl.arange(0, BLOCK_D)[None, :]
    for start in tl.static_range(0, HEADS, BLOCK_H):
        head = (start + tl.arange(0, BLOCK_H))[:, None]
        mask = (head < HEADS) & (column < HALF)
        place = head * head_stride + column
        first = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + place + HALF, mask=mask, other=0.0).to(tl.float32)
        place = head * out_head_stride + column
        kind = out_ptr.dtype.element_ty
        tl.store(out_ptr + place, (first * first_cos - second * first_sin).to(kind), mask=mask)
        tl.store(out_ptr + place + HALF, (second * second_cos + first * second_sin).to(kind), mask=mask)


@triton.jit
def rotary_kernel(
    q_ptr,
    k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    S,
    q_row_stride,
    q_token_stride,
    q_head_stride,
    k_row_stride,
    k_token_stride,
    k_head_stride,
    angle_row_stride,
    angle_token_stride,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Rotary embedding of one token's queries and keys, or its transpose applied to their gradients.

    Outputs are ``[B, S, heads, 2 * HALF]``, contiguous; inputs and angles may be strided except in the last dimension.
    """
    token = tl.program_id(0).to(tl.int64)
    row, place = token // S, token % S
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = column < HALF
    angle = row * angle_row_stride + place * angle_token_stride + column
    first_cos = tl.load(cos_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    second_cos = tl.load(cos_ptr + angle + HALF, mask=mask, other=0.0).to(tl.float32)
    first_sin = tl.load(sin_ptr + angle, mask=mask, other=0.0).to(tl.float32)
    second_sin = tl.load(sin_ptr + angle + HALF, mask=mask, other=0.0).to(tl.float32)
    if BACKWARD:
        # d x1 = d y1 c1 + d y2 s2,  d x2 = d y2 c2 - d y1 s1
        first_sin, second_sin = -second_sin, -first_sin
    _rotate(
        q_ptr + row * q_row_stride + place * q_token_stride,
        q_out_ptr + token * (Q_HEADS * 2 * HALF),
        q_head_stride,
        2 * HALF,
        first_cos,
        second_cos,
        first_sin,
        second_sin,
        Q_HEADS,
        HALF,
        BLOCK_H,
        BLOCK_D,
    )
    _rotate(
        k_ptr + row * k_row_stride + place * k_token_stride,
        k_out_ptr + token * (K_HEADS * 2 * HALF),
        k_head_stride,
        2 * HALF,
        first_cos,
        second_cos,
        first_sin,
        second_sin,
        K_HEADS,
        HALF,
        BLOCK_H,
        BLOCK_D,
    )
