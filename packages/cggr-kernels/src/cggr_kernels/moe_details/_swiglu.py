"""Backward of SwiGLU over sorted rows."""

import triton
import triton.language as tl

from cggr_kernels.moe_details._dispatch import SEGMENT


@triton.jit
def swiglu_gradient_kernel(
    z_ptr,
    dh_ptr,
    row_weight_ptr,
    dz_ptr,
    share_ptr,
    tiles_ptr,
    P,
    I: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Backward of SwiGLU for ROWS of the sorted rows, and the gradient of their weights.

    ``z`` [2P, I] is gate and up, ``dh`` [P, I] the gradient of SwiGLU without the rows' weights. Writes ``dz`` [2P, I]
    and ``share`` [P] float32, and overwrites ``dh`` with weight * SwiGLU, which the gradient of the down projection
    needs.
    """
    first = tl.program_id(0) * ROWS
    if first < tl.load(tiles_ptr) * SEGMENT:
        row = first + tl.arange(0, ROWS)
        weight = tl.load(row_weight_ptr + row)[:, None]
        share = tl.zeros([ROWS, BLOCK], tl.float32)
        gate_row = row[:, None].to(tl.int64) * I
        up_row = (P + row)[:, None].to(tl.int64) * I
        for start in range(0, I, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < I
            gate = tl.load(z_ptr + gate_row + column, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(z_ptr + up_row + column, mask=mask, other=0.0).to(tl.float32)
            d_h = tl.load(dh_ptr + gate_row + column, mask=mask, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            h = silu * up
            share += d_h * h
            d_h *= weight
            kind = dz_ptr.dtype.element_ty
            tl.store(dh_ptr + gate_row + column, (weight * h).to(kind), mask=mask)
            tl.store(dz_ptr + gate_row + column, (d_h * up * (sigmoid + silu * (1.0 - sigmoid))).to(kind), mask=mask)
            tl.store(dz_ptr + up_row + column, (d_h * silu).to(kind), mask=mask)
        tl.store(share_ptr + row, tl.sum(share, 1))
