"""The experts of a token-routed MLP: grouped matrix products over tokens sorted by expert.

The forward pass saves the gate and up projections for the backward pass, which recomputes the sorted copies of the
input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_kernels._checks import check_device, check_first_derivatives, check_float, check_index
from cggr_kernels._launching import ALIGNMENT
from cggr_kernels._library import register
from cggr_kernels.moe_details._dispatch import SEGMENT
from cggr_kernels.moe_plan import Plan, collect, combine, empty_plan, expand, make_plan
from cggr_kernels.moe_products import group_product, row_product, swiglu_gradient, up

MAX_ROWS = 2**30  # int32 numbers twice as many


def _launch(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor, save: bool) -> tuple[Tensor, ...]:
    if not index.numel():
        out, *rest = _fake(x, gate_up, down, index, weight, save)
        return (out.zero_(), *rest)
    plan = make_plan(index, gate_up.shape[0])
    x_PH, _ = expand(x, plan)
    h_PI, z_2PI = up(x_PH, gate_up, plan, save)
    del x_PH
    y_PH = row_product(h_PI, down, plan, planes=1, transposed=True)
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
    h_PI = row_product(g_PH, down, plan, planes=1, transposed=False)
    dz_2PI, share = swiglu_gradient(h_PI, z, row_weight, plan)
    if needs[2]:
        d_down = group_product(g_PH, h_PI, plan, planes=1)
    del g_PH, h_PI
    if needs[3]:
        d_weight = collect(share, plan)
    if needs[1]:
        x_PH, _ = expand(x, plan)
        d_gate_up = group_product(dz_2PI, x_PH, plan, planes=2).view(gate_up.shape)
        del x_PH
    if needs[0]:
        dx_PH = row_product(dz_2PI, gate_up.view(2 * E, double // 2, H), plan, 2, transposed=False)
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
    """Output of the experts, differentiable with respect to the input, both projections and the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        out, z, *plan = _forward(x, gate_up, down, index, weight, True)
        ctx.save_for_backward(x, gate_up, down, weight, z, *plan)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivatives()
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
            raise TypeError(f"{name} must have the dtype of x, got {tensor.dtype} and {x.dtype}; cast one of them")
    for name, size in (("hidden", H), ("intermediate", I)):
        if size * x.element_size() % ALIGNMENT:
            multiple = ALIGNMENT // x.element_size()
            raise ValueError(
                f"the {name} dimension must be a multiple of {multiple} in {x.dtype}, because rows start at multiples "
                f"of 16 bytes, got {size}. Use CGGR_BACKEND=torch for other sizes"
            )
    check_index("index", index, tuple(index.shape[:2]) or (0,))
    if index.shape[0] != T or tuple(weight.shape) != tuple(index.shape) or weight.dtype != torch.float32:
        raise ValueError(
            f"index must be [{T}, K] and weight float32 of the same shape, got {tuple(index.shape)} and "
            f"{tuple(weight.shape)} of {weight.dtype}"
        )
    if index.numel() + SEGMENT.value * E > MAX_ROWS:
        raise ValueError(
            f"{index.numel()} choices among {E} experts exceed the {MAX_ROWS} rows of one call; split the tokens into "
            "several calls"
        )
    check_device(x=x, gate_up=gate_up, down=down, index=index, weight=weight)


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """``out[t] = Σ_k weight[t, k] · (silu(g) * u) @ down[e].T`` with ``e = index[t, k]``.

    ``g`` and ``u`` are the halves of ``x[t] @ gate_up[e].T``. Forward and backward are bitwise reproducible, the host
    reads nothing, and the number of launches does not depend on the routing or the number of experts.

    Args:
        x: ``[T, H]``, float32, float16 or bfloat16. Rows of H and of I must be multiples of 16 bytes.
        gate_up: ``[E, 2I, H]``, same dtype as ``x``, the gate's rows first.
        down: ``[E, H, I]``, same dtype as ``x``.
        index: ``[T, K]``, int64: the expert of each choice. Anything outside ``[0, E)`` is a null choice, which
            contributes and costs nothing.
        weight: ``[T, K]``, float32: weight of each choice.

    Returns:
        ``[T, H]``, same dtype as ``x``; differentiable with respect to all arguments but ``index``.

    Raises:
        TypeError: If a dtype is not accepted, or ``x``, ``gate_up`` and ``down`` differ in dtype.
        ValueError: If shapes or devices do not match, or rows are not multiples of 16 bytes.

    Example:
        >>> x, gate_up, down = (torch.ones(size, device="cuda") for size in ((1, 8), (2, 16, 8), (2, 8, 8)))
        >>> index, weight = torch.tensor([[1]], device="cuda"), torch.ones(1, 1, device="cuda")
        >>> moe_experts(x, gate_up, down, index, weight)[0, 0]
        tensor(511.8283, device='cuda:0')
    """
    _check(x, gate_up, down, index, weight)
    # Read here: inside the autograd function gradients are off, and its inputs do not show the caller's gradient mode.
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, gate_up, down, weight))
    x, gate_up, down, weight, index = (tensor.contiguous() for tensor in (x, gate_up, down, weight, index))
    if not save:
        return _forward(x, gate_up, down, index, weight, False)[0]
    return _Experts.apply(x, gate_up, down, weight, index)
