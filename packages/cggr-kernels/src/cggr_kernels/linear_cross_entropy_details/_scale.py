"""Scales a gradient by the one that arrives for the loss, in place."""

import triton
import triton.language as tl


@triton.jit
def scale_kernel(x_ptr, factor_ptr, n, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """``x *= factor`` in place, with ``factor`` on the device; if it is 1, ``x`` is neither read nor written."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        start = tl.program_id(0).to(tl.int64) * STEPS * BLOCK
        for step in range(STEPS):
            place = start + step * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + place, mask=place < n, other=0.0).to(tl.float32)
            tl.store(x_ptr + place, (x * factor).to(x_ptr.dtype.element_ty), mask=place < n)
