"""Kernels of silu(gate) * up, forward and backward."""

import triton
import triton.language as tl


@triton.jit
def silu_mul_kernel(gate_ptr, up_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """``silu(gate) * up``, elementwise."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < N
    gate = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_gradient_kernel(gate_ptr, up_ptr, d_out_ptr, d_gate_ptr, d_up_ptr, N, BLOCK: tl.constexpr):
    """Gradients of ``silu(gate) * up``, whose sigmoid is recomputed."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < N
    gate = tl.load(gate_ptr + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=mask, other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + place, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    kind = d_gate_ptr.dtype.element_ty
    tl.store(d_gate_ptr + place, (d_out * up * (sigmoid + silu * (1.0 - sigmoid))).to(kind), mask=mask)
    tl.store(d_up_ptr + place, (d_out * silu).to(kind), mask=mask)
