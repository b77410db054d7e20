"""Rows of tokens to their experts, and back."""

import triton
import triton.language as tl

# Every expert's segment is padded to a multiple of this: a tile of rows belongs to one expert, and no load needs a
# mask.
SEGMENT: tl.constexpr = tl.constexpr(128)


@triton.jit
def count_kernel(
    index_ptr,
    rank_ptr,
    count_ptr,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """How often each expert is chosen in a block of tokens, and the rank of each choice among its expert's."""
    block = tl.program_id(0).to(tl.int64)
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    count = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for choice in range(K):
        expert = tl.load(index_ptr + t * K + choice, mask=t < T, other=-1)
        count += tl.where(e == expert[:, None], 1, 0)
    rank = tl.cumsum(count, 0) - count
    for choice in range(K):
        expert = tl.load(index_ptr + t * K + choice, mask=t < T, other=-1)
        hit = e == expert[:, None]
        tl.store(rank_ptr + t * K + choice, tl.sum(tl.where(hit, rank, 0), 1), mask=t < T)
        rank += tl.where(hit, 1, 0)
    tl.store(count_ptr + block * E + e, tl.sum(count, 0), mask=e < E)


@triton.jit
def prefix_kernel(
    count_ptr,
    segment_ptr,
    used_ptr,
    tiles_ptr,
    blocks,
    E: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Replace each block's counts by those of the blocks before it, and lay out the segments; one program.

    ``segment`` is [E + 1]: the first row of each expert, and the number of rows in use; ``used`` is [E], ``tiles`` [1].
    """
    e = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, blocks, BLOCK_B):
        b = start + tl.arange(0, BLOCK_B)
        place = count_ptr + b[:, None].to(tl.int64) * E + e
        mask = (b < blocks)[:, None] & (e < E)
        count = tl.load(place, mask=mask, other=0)
        tl.store(place, total + tl.cumsum(count, 0) - count, mask=mask)
        total += tl.sum(count, 0)
    padded = (total + SEGMENT - 1) // SEGMENT * SEGMENT
    rows = tl.sum(padded, 0)
    tl.store(segment_ptr + e, tl.cumsum(padded, 0) - padded, mask=e < E)
    tl.store(segment_ptr + E, rows)
    tl.store(used_ptr + e, total, mask=e < E)
    tl.store(tiles_ptr, rows // SEGMENT)


@triton.jit
def place_kernel(
    index_ptr,
    rank_ptr,
    count_ptr,
    segment_ptr,
    row_ptr,
    tile_expert_ptr,
    choices,
    blocks,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row of each choice, −1 for a null one; the programs beyond the blocks write one expert's tile table each."""
    program = tl.program_id(0)
    if program < blocks:
        at = program.to(tl.int64) * BLOCK_T * K + tl.arange(0, BLOCK)
        mask = (tl.arange(0, BLOCK) < BLOCK_T * K) & (at < choices)
        expert = tl.load(index_ptr + at, mask=mask, other=-1)
        known = (expert >= 0) & (expert < E)
        row = tl.load(rank_ptr + at, mask=mask, other=0)
        row += tl.load(count_ptr + program.to(tl.int64) * E + expert, mask=known, other=0)
        row += tl.load(segment_ptr + expert, mask=known, other=0)
        tl.store(row_ptr + at, tl.where(known, row, -1), mask=mask)
    else:
        owner = program - blocks
        first = tl.load(segment_ptr + owner) // SEGMENT
        last = tl.load(segment_ptr + owner + 1) // SEGMENT
        for start in range(first, last, BLOCK):
            tile = start + tl.arange(0, BLOCK)
            tl.store(tile_expert_ptr + tile, tl.zeros([BLOCK], tl.int32) + owner, mask=tile < last)


@triton.jit
def expand_kernel(
    x_ptr,
    row_ptr,
    segment_ptr,
    used_ptr,
    weight_ptr,
    out_ptr,
    row_weight_ptr,
    E: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    PAD_PROGRAMS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy each token's row of ``x`` [T, H] to the rows of its choices, and zero the padding of the segments.

    The first E × PAD_PROGRAMS programs do the padding, the others one token each. ``row_weight`` [rows] gets the
    weights of the choices.
    """
    program = tl.program_id(0)
    if program < E * PAD_PROGRAMS:
        expert = program // PAD_PROGRAMS
        first = tl.load(segment_ptr + expert) + tl.load(used_ptr + expert)
        last = tl.load(segment_ptr + expert + 1)
        # Fewer than 128 rows, so that int32 holds their offsets from the first.
        out_ptr += first.to(tl.int64) * H
        rows: tl.constexpr = SEGMENT // PAD_PROGRAMS
        pad = program % PAD_PROGRAMS * rows + tl.arange(0, rows)
        inside = pad < last - first
        if HAS_WEIGHT:
            tl.store(row_weight_ptr + first + pad, tl.zeros([rows], tl.float32), mask=inside)
        for start in range(0, H, BLOCK):
            h = start + tl.arange(0, BLOCK)
            zeros = tl.zeros([rows, BLOCK], out_ptr.dtype.element_ty)
            tl.store(out_ptr + pad[:, None] * H + h, zeros, mask=inside[:, None] & (h < H))
    else:
        t = (program - E * PAD_PROGRAMS).to(tl.int64)
        for start in range(0, H, BLOCK):
            h = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + t * H + h, mask=h < H)
            for choice in tl.static_range(K):
                row = tl.load(row_ptr + t * K + choice)
                tl.store(out_ptr + row.to(tl.int64) * H + h, x, mask=(h < H) & (row >= 0))
        if HAS_WEIGHT:
            for choice in tl.static_range(K):
                row = tl.load(row_ptr + t * K + choice)
                tl.store(row_weight_ptr + row, tl.load(weight_ptr + t * K + choice), mask=row >= 0)


@triton.jit
def combine_kernel(
    rows_ptr,
    row_ptr,
    weight_ptr,
    out_ptr,
    H: tl.constexpr,
    K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Weighted sum of the rows of each token's choices, in float32 and in the order of the choices."""
    t = tl.program_id(0).to(tl.int64)
    for start in range(0, H, BLOCK):
        h = start + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for choice in tl.static_range(K):
            row = tl.load(row_ptr + t * K + choice)
            part = tl.load(rows_ptr + row.to(tl.int64) * H + h, mask=(h < H) & (row >= 0), other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                part *= tl.load(weight_ptr + t * K + choice)
            total += part
        tl.store(out_ptr + t * H + h, total.to(out_ptr.dtype.element_ty), mask=h < H)


@triton.jit
def collect_kernel(share_ptr, row_ptr, out_ptr, choices, BLOCK: tl.constexpr):
    """The entry of ``share`` [rows] at the row of each choice; 0 for null choices."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_ptr + at, mask=at < choices, other=-1)
    tl.store(out_ptr + at, tl.load(share_ptr + row, mask=row >= 0, other=0.0), mask=at < choices)
