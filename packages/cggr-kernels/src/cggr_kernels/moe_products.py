"""Grouped matrix products over rows sorted by expert, in persistent kernels.

One program per multiprocessor works through the tiles, whatever the number of experts; the number of tiles is read on
the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cggr_kernels._launching import Launch, descriptor
from cggr_kernels._library import shared_memory
from cggr_kernels.moe_details._products import group_product_kernel, row_product_kernel, up_kernel
from cggr_kernels.moe_details._swiglu import swiglu_gradient_kernel
from cggr_kernels.moe_plan import Plan

_SWIGLU_ROWS = 8
_SWIGLU_BLOCK = 256


class Blocks(NamedTuple):
    """Tile of one program and its launch options."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int
    flatten: bool = False

    def options(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "GROUP_M": self.group,
            "PROGRAMS": _multiprocessors(device),
            "FLATTEN": self.flatten,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Table(NamedTuple):
    """Blocks of each kernel; the up projection's hold two tiles of columns, gate and up."""

    up: Blocks
    rows: Blocks
    group: Blocks


# Measured on an H200, and fixed, so that sums always run in the same order.
HALF_BLOCKS = Table(
    up=Blocks(128, 128, 64, 8, 8, 4, True),
    rows=Blocks(128, 256, 64, 8, 8, 4, True),
    group=Blocks(128, 256, 64, 8, 8, 4, True),
)
# For devices with less shared memory than HALF_BLOCKS needs.
SMALL_BLOCKS = Table(
    up=Blocks(128, 64, 32, 8, 8, 3), rows=Blocks(128, 128, 32, 8, 8, 3), group=Blocks(128, 128, 32, 8, 8, 3)
)
FLOAT_BLOCKS = Table(
    up=Blocks(64, 32, 16, 8, 4, 3), rows=Blocks(64, 64, 32, 8, 4, 2), group=Blocks(64, 64, 32, 8, 4, 2)
)
_MUCH_SHARED_MEMORY = 229_424

_up, _rows, _groups = Launch(up_kernel), Launch(row_product_kernel), Launch(group_product_kernel)
_swiglu_gradient = Launch(swiglu_gradient_kernel)


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a device; a small number in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _table(tensor: Tensor) -> Table:
    if tensor.dtype == torch.float32:
        return FLOAT_BLOCKS
    return HALF_BLOCKS if shared_memory(tensor.device) >= _MUCH_SHARED_MEMORY else SMALL_BLOCKS


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def up(x_PH: Tensor, gate_up: Tensor, plan: Plan, save: bool) -> tuple[Tensor, Tensor]:
    """Gate and up projections of the sorted rows, and their SwiGLU.

    Args:
        x_PH: ``[P, H]``, the sorted rows.
        gate_up: ``[E, 2I, H]``.
        plan: Which rows belong to which expert.
        save: Whether to return gate and up as well.

    Returns:
        SwiGLU ``[P, I]``, and gate and up ``[2P, I]`` (empty without ``save``); undefined beyond the rows in use.
    """
    (P, H), E = x_PH.shape, gate_up.shape[0]
    I = gate_up.shape[1] // 2
    blocks = _table(x_PH).up
    h_PI = x_PH.new_empty(P, I)
    z_2PI = x_PH.new_empty(2 * P if save else 0, I)
    out = (blocks.m, blocks.n)
    _up(
        _multiprocessors(x_PH.device),
        descriptor(x_PH, blocks.m, blocks.k),
        descriptor(gate_up.view(2 * E, I, H), 2, blocks.n, blocks.k),
        descriptor(z_2PI if save else h_PI, *out),
        descriptor(h_PI, *out),
        plan.tile_expert,
        plan.tiles,
        P,
        I,
        H,
        SAVE=save,
        PRECISION=_precision(),
        **blocks.options(x_PH.device),
    )
    return h_PI, z_2PI


def row_product(a: Tensor, w: Tensor, plan: Plan, planes: int, transposed: bool) -> Tensor:
    """Sorted rows times their experts' matrices, summed over planes.

    Args:
        a: ``[planes · P, K]``.
        w: ``[E · planes, K, N]``, or if ``transposed`` ``[E · planes, N, K]``.
        plan: Which rows belong to which expert.
        planes: Matrices per expert.
        transposed: Whether the matrices are transposed.

    Returns:
        ``[P, N]``, undefined beyond the rows in use.
    """
    P, K = a.shape[0] // planes, a.shape[1]
    N = w.shape[1] if transposed else w.shape[2]
    blocks = _table(a).rows
    out = a.new_empty(P, N)
    _rows(
        _multiprocessors(a.device),
        descriptor(a, blocks.m, blocks.k),
        descriptor(w, 1, *((blocks.n, blocks.k) if transposed else (blocks.k, blocks.n))),
        descriptor(out, blocks.m, blocks.n // 2),
        plan.tile_expert,
        plan.tiles,
        P,
        N,
        K,
        PLANES=planes,
        TRANSPOSED=transposed,
        PRECISION=_precision(),
        **blocks.options(a.device),
    )
    return out


def swiglu_gradient(dh_PI: Tensor, z_2PI: Tensor, row_weight: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Backward of SwiGLU; overwrites ``dh_PI`` with weight times SwiGLU.

    Args:
        dh_PI: ``[P, I]``, gradient of SwiGLU without the rows' weights.
        z_2PI: ``[2P, I]``, gate and up.
        row_weight: ``[P]``, float32.
        plan: How many rows are in use.

    Returns:
        Gradients of gate and up ``[2P, I]`` and of the rows' weights ``[P]``, undefined beyond the rows in use.
    """
    P, I = dh_PI.shape
    dz_2PI = torch.empty_like(z_2PI)
    share = torch.empty_like(row_weight)
    _swiglu_gradient(
        P // _SWIGLU_ROWS,
        z_2PI,
        dh_PI,
        row_weight,
        dz_2PI,
        share,
        plan.tiles,
        P,
        I,
        ROWS=_SWIGLU_ROWS,
        BLOCK=_SWIGLU_BLOCK,
        num_warps=4,
    )
    return dz_2PI, share


def group_product(a: Tensor, b: Tensor, plan: Plan, planes: int) -> Tensor:
    """For each expert and plane, ``a[plane, its rows].T @ b[its rows]``; zeros for an expert without rows.

    Args:
        a: ``[planes · P, M]``.
        b: ``[P, N]``.
        plan: Which rows belong to which expert.
        planes: Matrices per expert.

    Returns:
        ``[E · planes, M, N]``.
    """
    E, M, N = plan.used.shape[0], a.shape[1], b.shape[1]
    blocks = _table(a).group
    out = a.new_empty(E * planes, M, N)
    _groups(
        _multiprocessors(a.device),
        descriptor(a, blocks.k, blocks.m),
        descriptor(b, blocks.k, blocks.n),
        descriptor(out, 1, blocks.m, blocks.n // 2),
        plan.segment,
        b.shape[0],
        E,
        M,
        N,
        PLANES=planes,
        PRECISION=_precision(),
        **blocks.options(a.device),
    )
    return out
