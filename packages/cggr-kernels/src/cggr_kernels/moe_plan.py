"""Sort the choices by expert, on the device and without atomics: the row of each choice and the expert of each tile.

The rows of an expert form one segment, padded to a multiple of 128. Buffers are sized for the worst case, which the
host knows; kernels read how much of them is in use.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cggr_kernels._launching import Launch
from cggr_kernels.moe_details._dispatch import (
    SEGMENT,
    collect_kernel,
    combine_kernel,
    count_kernel,
    expand_kernel,
    place_kernel,
    prefix_kernel,
)

_TILE = 8192  # elements of a [tokens, experts] tile that one program holds
_PREFIX_TILE = 16384  # the same of a [blocks of tokens, experts] tile
_MOST_TOKENS = 256
_PAD_PROGRAMS = 8
_COPY_BLOCK = 1024
_COLLECT_BLOCK = 512

_count, _prefix, _place = Launch(count_kernel), Launch(prefix_kernel), Launch(place_kernel)
_expand, _combine, _collect = Launch(expand_kernel), Launch(combine_kernel), Launch(collect_kernel)


class Plan(NamedTuple):
    """Where each choice's row is.

    Attributes:
        row: ``[T, K]``, int32: the row of each choice, −1 for a null one.
        segment: ``[E + 1]``, int32: the first row of each expert, and the rows in use.
        used: ``[E]``, int32: choices of each expert.
        tile_expert: int32: the expert of each tile of 128 rows; undefined beyond the tiles in use.
        tiles: ``[1]``, int32: tiles in use.
    """

    row: Tensor
    segment: Tensor
    used: Tensor
    tile_expert: Tensor
    tiles: Tensor


def row_bound(choices: int, num_experts: int) -> int:
    """Upper bound on the rows that the segments need, a multiple of 128, whatever the routing.

    Args:
        choices: Number of tokens times experts per token.
        num_experts: Number of experts.

    Returns:
        Number of rows.

    Example:
        >>> row_bound(2, 8), row_bound(1000, 2)
        (256, 1152)
    """
    segment = SEGMENT.value
    return (choices + (segment - 1) * min(num_experts, choices)) // segment * segment


def empty_plan(index: Tensor, num_experts: int) -> Plan:
    """A plan whose tensors are uninitialized."""
    T, K = index.shape
    sizes = (num_experts + 1, num_experts, row_bound(T * K, num_experts) // SEGMENT.value, 1)
    rest = (index.new_empty(size, dtype=torch.int32) for size in sizes)
    return Plan(torch.empty_like(index, dtype=torch.int32), *rest)


def make_plan(index: Tensor, num_experts: int) -> Plan:
    """Sort the choices by expert, and by token within an expert: three launches.

    Args:
        index: ``[T, K]``, int64, contiguous: the expert of each choice. Anything outside ``[0, E)`` is a null choice.
        num_experts: E.

    Returns:
        The plan.
    """
    T, K = index.shape
    E = num_experts
    block_e = triton.next_power_of_2(E)
    block_t = max(1, min(_MOST_TOKENS, _TILE // block_e))
    blocks = triton.cdiv(T, block_t)
    plan = empty_plan(index, E)
    rank = torch.empty_like(plan.row)
    count = index.new_empty(blocks, E, dtype=torch.int32)
    _count(blocks, index, rank, count, T, E, K, BLOCK_T=block_t, BLOCK_E=block_e, num_warps=4)
    block_b = max(1, min(triton.next_power_of_2(blocks), _PREFIX_TILE // block_e))
    _prefix(1, count, plan.segment, plan.used, plan.tiles, blocks, E, BLOCK_B=block_b, BLOCK_E=block_e, num_warps=16)
    _place(
        blocks + E,
        index,
        rank,
        count,
        plan.segment,
        plan.row,
        plan.tile_expert,
        T * K,
        blocks,
        E,
        K,
        BLOCK_T=block_t,
        BLOCK=triton.next_power_of_2(block_t * K),
        num_warps=4,
    )
    return plan


def expand(x: Tensor, plan: Plan, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Copy each token to the rows of its choices, with zeros in the padding of the segments.

    Args:
        x: ``[T, H]``, contiguous.
        plan: Where the rows go.
        weight: ``[T, K]``, float32, contiguous, copied in the same way; or ``None``.

    Returns:
        ``[rows, H]`` and ``[rows]`` float32 (empty without weights); undefined beyond the rows in use.
    """
    (T, K), H, E = plan.row.shape, x.shape[1], plan.used.shape[0]
    rows = plan.tile_expert.shape[0] * SEGMENT.value
    out = x.new_empty(rows, H)
    row_weight = x.new_empty(0 if weight is None else rows, dtype=torch.float32)
    _expand(
        E * _PAD_PROGRAMS + T,
        x,
        plan.row,
        plan.segment,
        plan.used,
        row_weight if weight is None else weight,
        out,
        row_weight,
        E,
        H,
        K,
        PAD_PROGRAMS=_PAD_PROGRAMS,
        HAS_WEIGHT=weight is not None,
        BLOCK=min(_COPY_BLOCK, triton.next_power_of_2(H)),
        num_warps=4,
    )
    return out, row_weight


def combine(rows: Tensor, plan: Plan, weight: Tensor | None = None) -> Tensor:
    """Sum the rows of each token's choices in float32, in the order of the choices.

    Args:
        rows: ``[rows, H]``, contiguous.
        plan: Where the rows are.
        weight: ``[T, K]``, float32, contiguous: weight of each choice; or ``None``.

    Returns:
        ``[T, H]``, same dtype as ``rows``.
    """
    (T, K), H = plan.row.shape, rows.shape[1]
    out = rows.new_empty(T, H)
    _combine(
        T,
        rows,
        plan.row,
        plan.row if weight is None else weight,
        out,
        H,
        K,
        HAS_WEIGHT=weight is not None,
        BLOCK=min(_COPY_BLOCK, triton.next_power_of_2(H)),
        num_warps=4,
    )
    return out


def collect(share: Tensor, plan: Plan) -> Tensor:
    """Gather a value per row back to the choices.

    Args:
        share: ``[rows]``, float32.
        plan: Where the rows are.

    Returns:
        ``[T, K]``, float32, 0 for null choices.
    """
    out = torch.empty_like(plan.row, dtype=torch.float32)
    choices = out.numel()
    _collect(triton.cdiv(choices, _COLLECT_BLOCK), share, plan.row, out, choices, BLOCK=_COLLECT_BLOCK, num_warps=4)
    return out
