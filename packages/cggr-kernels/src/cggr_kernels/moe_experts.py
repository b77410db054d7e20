"""The experts of a token-routed MLP: grouped products over the tokens sorted by expert.

Persistent kernels: as many programs as the device has multiprocessors take tiles in turn, whatever the number of
experts; how many tiles there are is read on the device. The forward pass keeps gate and up projection for the backward
pass; the sorted copies of the input are made again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cggr_kernels._checks import check_device, check_float, check_index
from cggr_kernels._library import register
from cggr_kernels.moe_details._dispatch import SEGMENT
from cggr_kernels.moe_details._products import group_product_kernel, row_product_kernel, up_kernel
from cggr_kernels.moe_details._swiglu import swiglu_gradient_kernel
from cggr_kernels.moe_plan import Plan, collect, combine, empty_plan, expand, make_plan

ALIGNMENT = 16  # bytes between rows that the copy engine can start at
MAX_ROWS = 2**30  # twice as many are numbered in int32
_SWIGLU_ROWS = 8
_SWIGLU_BLOCK = 256


class Blocks(NamedTuple):
    """Tile of one program, and how it is run; ``share`` programs share a multiprocessor."""

    m: int
    n: int
    k: int
    group: int
    warps: int
    stages: int
    flatten: bool = False
    share: int = 1

    def grid(self, device: torch.device) -> tuple[int]:
        """Programs of a persistent launch."""
        return (self.share * _multiprocessors(device),)

    def options(self, device: torch.device) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k,
            "GROUP_M": self.group,
            "PROGRAMS": self.grid(device)[0],
            "FLATTEN": self.flatten,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# Chosen by what was measured on an H200 (see benchmarks/moe.py); fixed, so that sums are made in the same order always.
HALF_BLOCKS = {
    "up": Blocks(128, 128, 64, 8, 8, 4, True),
    "down": Blocks(128, 256, 64, 8, 8, 4, True),
    "down_gradient": Blocks(128, 256, 64, 8, 8, 4, True),
    "up_gradient": Blocks(128, 256, 64, 8, 8, 4, True),
    "group": Blocks(128, 256, 64, 8, 8, 4, True),
}
FLOAT_BLOCKS = dict.fromkeys(HALF_BLOCKS, Blocks(64, 64, 32, 8, 4, 2)) | {"up": Blocks(64, 32, 16, 8, 4, 3)}


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device; in the interpreter few, but more than one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _blocks(name: str, tensor: Tensor) -> Blocks:
    return (FLOAT_BLOCKS if tensor.dtype == torch.float32 else HALF_BLOCKS)[name]


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _described(tensor: Tensor, *block: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor, list(block))


def _up(x_PH: Tensor, gate_up: Tensor, plan: Plan, save: bool) -> tuple[Tensor, Tensor]:
    """SwiGLU of the sorted rows [P, I], and gate and up themselves [2P, I] if they are to be saved."""
    (P, H), E = x_PH.shape, gate_up.shape[0]
    I = gate_up.shape[1] // 2
    blocks = _blocks("up", x_PH)
    h_PI = x_PH.new_empty(P, I)
    z_2PI = x_PH.new_empty(2 * P if save else 0, I)
    out = (blocks.m, blocks.n)
    up_kernel[blocks.grid(x_PH.device)](
        _described(x_PH, blocks.m, blocks.k),
        _described(gate_up.view(2 * E, I, H), 2, blocks.n, blocks.k),
        _described(z_2PI if save else h_PI, *out),
        _described(h_PI, *out),
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


def _row_product(name: str, a: Tensor, w: Tensor, plan: Plan, planes: int, transposed: bool) -> Tensor:
    """Sorted rows [planes · P, K] times their experts' matrices [planes · E, K, N] (transposed: [·, N, K]): [P, N]."""
    P, K = a.shape[0] // planes, a.shape[1]
    N = w.shape[1] if transposed else w.shape[2]
    blocks = _blocks(name, a)
    out = a.new_empty(P, N)
    row_product_kernel[blocks.grid(a.device)](
        _described(a, blocks.m, blocks.k),
        _described(w, 1, *((blocks.n, blocks.k) if transposed else (blocks.k, blocks.n))),
        _described(out, blocks.m, blocks.n // 2),
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


def _swiglu_gradient(dh_PI: Tensor, z_2PI: Tensor, row_weight: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """Gradient of gate and up [2P, I] and of the rows' weights [P]; weight times SwiGLU takes the place of ``dh``."""
    P, I = dh_PI.shape
    dz_2PI = torch.empty_like(z_2PI)
    share = torch.empty_like(row_weight)
    swiglu_gradient_kernel[(P // _SWIGLU_ROWS,)](
        z_2PI, dh_PI, row_weight, dz_2PI, share, plan.tiles, P, I, ROWS=_SWIGLU_ROWS, BLOCK=_SWIGLU_BLOCK, num_warps=4
    )
    return dz_2PI, share


def _group_product(a: Tensor, b: Tensor, plan: Plan, planes: int) -> Tensor:
    """For each expert, ``a[its rows].T @ b[its rows]``: [planes · E, M, N] of a [planes · P, M] and b [P, N]."""
    E, M, N = plan.used.shape[0], a.shape[1], b.shape[1]
    blocks = _blocks("group", a)
    out = a.new_empty(E * planes, M, N)
    group_product_kernel[blocks.grid(a.device)](
        _described(a, blocks.k, blocks.m),
        _described(b, blocks.k, blocks.n),
        _described(out, 1, blocks.m, blocks.n // 2),
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


def _launch(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, save: bool) -> tuple[Tensor, ...]:
    if not index.numel():
        out, *rest = _fake(x, gate_up, down, index, weight, save)
        return (out.zero_(), *rest)
    plan = make_plan(index, gate_up.shape[0])
    x_PH, _ = expand(x, plan)
    h_PI, z_2PI = _up(x_PH, gate_up, plan, save)
    del x_PH
    y_PH = _row_product("down", h_PI, down, plan, planes=1, transposed=True)
    del h_PI
    return combine(y_PH, plan, weight), z_2PI, *plan


def _fake(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, save: bool) -> tuple[Tensor, ...]:
    plan = empty_plan(index, gate_up.shape[0])
    rows = 2 * plan.tile_expert.shape[0] * SEGMENT.value if save else 0
    return torch.empty_like(x), x.new_empty(rows, down.shape[2]), *plan


def _launch_gradient(
    d_out: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    z: Tensor,
    row: Tensor,
    segment: Tensor,
    used: Tensor,
    tile_expert: Tensor,
    tiles: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    if not row.numel():
        grads = _fake_gradient(d_out, x, gate_up, down, weight, z, row, segment, used, tile_expert, tiles, needs)
        return tuple(grad.zero_() for grad in grads)
    plan = Plan(row, segment, used, tile_expert, tiles)
    E, double, H = gate_up.shape
    d_x, d_gate_up, d_down, d_weight = (tensor.new_empty(0) for tensor in (x, gate_up, down, weight))
    g_PH, row_weight = expand(d_out, plan, weight)
    h_PI = _row_product("down_gradient", g_PH, down, plan, planes=1, transposed=False)
    dz_2PI, share = _swiglu_gradient(h_PI, z, row_weight, plan)
    if needs[2]:
        d_down = _group_product(g_PH, h_PI, plan, planes=1)
    del g_PH, h_PI
    if needs[3]:
        d_weight = collect(share, plan)
    if needs[1]:
        x_PH, _ = expand(x, plan)
        d_gate_up = _group_product(dz_2PI, x_PH, plan, planes=2).view(gate_up.shape)
        del x_PH
    if needs[0]:
        dx_PH = _row_product("up_gradient", dz_2PI, gate_up.view(2 * E, double // 2, H), plan, 2, transposed=False)
        d_x = combine(dx_PH, plan)
    return d_x, d_gate_up, d_down, d_weight


def _fake_gradient(
    d_out: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weight: Tensor,
    z: Tensor,
    row: Tensor,
    segment: Tensor,
    used: Tensor,
    tile_expert: Tensor,
    tiles: Tensor,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(tensor) if need else tensor.new_empty(0)
        for tensor, need in zip((x, gate_up, down, weight), needs, strict=True)
    )


_forward = register(
    "moe_experts(Tensor x, Tensor gate_up, Tensor down, Tensor index, Tensor weight, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)
_gradient = register(
    "moe_experts_gradient(Tensor d_out, Tensor x, Tensor gate_up, Tensor down, Tensor weight, Tensor z, Tensor row,"
    " Tensor segment, Tensor used, Tensor tile_expert, Tensor tiles, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_gradient,
    _fake_gradient,
)


class _Experts(torch.autograd.Function):
    """Output of the experts, differentiable in the input, both projections and the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        needs = list(ctx.needs_input_grad[:4])
        out, z, *plan = _forward(x, gate_up, down, index, weight, any(needs))
        ctx.save_for_backward(x, gate_up, down, weight, z, *plan)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        needs = list(ctx.needs_input_grad[:4])
        grads = _gradient(d_out.contiguous(), *ctx.saved_tensors, needs)
        return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), None


def _check(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> None:
    check_float("x", x, 2)
    check_float("gate_up", gate_up, 3)
    check_float("down", down, 3)
    T, H = x.shape
    E, double, _ = gate_up.shape
    I = double // 2
    if E < 1 or double % 2 or gate_up.shape[2] != H:
        raise ValueError(f"gate_up must be [E, 2I, {H}] for x {tuple(x.shape)}, got {tuple(gate_up.shape)}")
    if tuple(down.shape) != (E, H, I):
        raise ValueError(
            f"down must have shape {(E, H, I)} for gate_up {tuple(gate_up.shape)}, got {tuple(down.shape)}"
        )
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and x is {x.dtype}; cast them to one dtype")
    for name, size in (("hidden", H), ("intermediate", I)):
        if size * x.element_size() % ALIGNMENT:
            multiple = ALIGNMENT // x.element_size()
            raise ValueError(
                f"the {name} dimension is {size}; these kernels take multiples of {multiple} in {x.dtype}, because "
                "rows must begin at multiples of 16 bytes. Use CGGR_BACKEND=torch for other sizes"
            )
    check_index("index", index, tuple(index.shape[:2]) or (0,))
    if index.shape[0] != T or tuple(weight.shape) != tuple(index.shape) or weight.dtype != torch.float32:
        raise ValueError(
            f"index must be [{T}, K] and weight float32 of the same shape, got {tuple(index.shape)} and "
            f"{tuple(weight.shape)} of {weight.dtype}"
        )
    if index.numel() + SEGMENT.value * E > MAX_ROWS:
        raise ValueError(f"{index.numel()} choices among {E} experts are more than the {MAX_ROWS} rows one call can do")
    check_device(x=x, gate_up=gate_up, down=down, index=index, weight=weight)


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """``out[t] = Σ_k weight[t, k] · (silu(g) * u) @ down[e].T`` with ``e = index[t, k]``.

    ``g`` and ``u`` are the halves of ``x[t] @ gate_up[e].T``. Bitwise the same from run to run, forward and backward;
    nothing is read by the host, and the number of launches does not depend on the routing or the number of experts.

    Args:
        x: ``[T, H]``, float32, float16 or bfloat16. H and I take a multiple of 16 bytes.
        gate_up: ``[E, 2I, H]``, dtype of ``x``, the gate's rows first.
        down: ``[E, H, I]``, dtype of ``x``.
        index: ``[T, K]``, int64: the expert of each choice. One outside of ``[0, E)`` is null: it contributes nothing
            and costs nothing.
        weight: ``[T, K]``, float32: factors of the choices.

    Returns:
        ``[T, H]``, dtype of ``x``; differentiable in all of them but ``index``.

    Raises:
        TypeError: If a dtype is not accepted, or those of ``x``, ``gate_up`` and ``down`` differ.
        ValueError: If shapes, devices or the alignment of rows do not fit.

    Example:
        >>> x, gate_up, down = (torch.ones(size, device="cuda") for size in ((1, 8), (2, 16, 8), (2, 8, 8)))
        >>> index, weight = torch.tensor([[1]], device="cuda"), torch.ones(1, 1, device="cuda")
        >>> moe_experts(x, gate_up, down, index, weight)[0, 0]
        tensor(511.8283, device='cuda:0')
    """
    _check(x, gate_up, down, index, weight)
    return _Experts.apply(*(tensor.contiguous() for tensor in (x, gate_up, down, weight, index)))
