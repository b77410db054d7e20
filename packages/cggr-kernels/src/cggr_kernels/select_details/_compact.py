"""From a mask to ascending positions."""

import triton
import triton.language as tl


@triton.jit
def compact_kernel(
    keep_ptr,
    count_ptr,
    weight_ptr,
    index_ptr,
    valid_ptr,
    slot_weight_ptr,
    stride_wb,
    stride_ws,
    S,
    capacity,
    BLOCK: tl.constexpr,
):
    """Kept positions in ascending order, filled up to ``capacity`` with the first positions that are not kept.

    ``count`` [B, S] is the number of kept entries up to and including each, which gives each entry its slot.
    """
    b = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < S
    keep = tl.load(keep_ptr + b * S + place, mask=inside, other=0) != 0
    kept = tl.load(count_ptr + b * S + place, mask=inside, other=0)
    spare = capacity - tl.load(count_ptr + b * S + S - 1)
    others = place + 1 - kept
    member = inside & (keep | (others <= spare))
    slot = b * capacity + kept + tl.minimum(others, spare) - 1
    tl.store(index_ptr + slot, place.to(tl.int64), mask=member)
    tl.store(valid_ptr + slot, keep, mask=member)
    weight = tl.load(weight_ptr + b * stride_wb + place.to(tl.int64) * stride_ws, mask=member & keep, other=0.0)
    tl.store(slot_weight_ptr + slot, weight, mask=member)
