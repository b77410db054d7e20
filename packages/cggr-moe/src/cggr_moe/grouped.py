"""The experts' computation: the reference of the op ``moe_experts``.

The choices are sorted by expert, so that each expert's rows form one block of a grouped matrix product. If torch has no
grouped product for the device and dtype, a loop over the experts replaces it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from cggr_core.backends import register_reference
from cggr_core.checks import values_are_free

__all__ = ["moe_experts_reference"]

_GROUPED_DEVICES = ("cpu", "cuda")
_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNMENT = 16  # alignment of rows that torch's grouped product requires, in bytes


def _has_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
    aligned = all(size * weight.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])
    # In tracing, torch has the grouped product in bfloat16 only.
    dtypes = _GROUPED_DTYPES[:1] if torch.compiler.is_compiling() else _GROUPED_DTYPES
    return rows.device.type in _GROUPED_DEVICES and weight.dtype in dtypes and aligned


def _parts(rows: Tensor, load: Tensor) -> tuple[Tensor, ...]:
    """The rows of each expert, then those beyond."""
    sizes = load.tolist()
    return rows.split([*sizes, rows.shape[0] - sum(sizes)])


@torch.library.custom_op("cggr_moe::loop_linear", mutates_args=())
def _loop_linear(rows: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    """One product per expert: ``rows`` [N, A] sorted by expert times ``weight`` [E, B, A]; zeros beyond the load."""
    *parts, rest = _parts(rows, load)
    out = [part @ w.t() for part, w in zip(parts, weight, strict=True)]
    return torch.cat([*out, rest.new_zeros(rest.shape[0], weight.shape[1])])


@_loop_linear.register_fake
def _(rows: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("cggr_moe::loop_linear_gradient", mutates_args=())
def _loop_linear_gradient(upstream: Tensor, rows: Tensor, weight: Tensor, load: Tensor) -> tuple[Tensor, Tensor]:
    d_weight = [d.t() @ part for d, part in zip(_parts(upstream, load)[:-1], _parts(rows, load)[:-1], strict=True)]
    return _loop_linear(upstream, weight.transpose(1, 2), load), torch.stack(d_weight)


@_loop_linear_gradient.register_fake
def _(upstream: Tensor, rows: Tensor, weight: Tensor, load: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_loop_linear_gradient(upstream.contiguous(), *ctx.saved_tensors), None


_loop_linear.register_autograd(_backward, setup_context=_save)


def _grouped_linear(rows: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    """``rows`` [N, A], sorted by expert, times ``weight`` [E, B, A]: [N, B].

    Rows beyond the sum of ``load`` [E] are undefined.
    """
    if _has_grouped_mm(rows, weight):
        return grouped_mm(rows, weight.transpose(1, 2), offs=load.cumsum(0).int())
    return _loop_linear(rows, weight, load)


def moe_experts_reference(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Plain-torch op ``moe_experts``: ``out[t] = Σ_k weight[t, k] · (silu(g) · u) @ down[e].T``.

    Here ``e = index[t, k]``, and ``g`` and ``u`` are the halves of ``x[t] @ gate_up[e].T``. Sums run in the order of k,
    in float32 or better.

    Args:
        x: ``[T, H]``.
        gate_up: ``[E, 2I, H]``, the gate's rows first.
        down: ``[E, H, I]``.
        index: ``[T, K]``, int64: the expert of each choice. A negative index is a null choice, which contributes and
            costs nothing.
        weight: ``[T, K]``, float32 or float64.

    Returns:
        ``[T, H]``, same dtype as ``x``; differentiable with respect to ``x``, ``gate_up``, ``down`` and ``weight``.
    """
    (T, K), E = index.shape, gate_up.shape[0]
    places = index.flatten()
    places = torch.where(places < 0, E, places)
    order = places.argsort(stable=True)
    load_E = places.new_zeros(E + 1).scatter_add(0, places, torch.ones_like(places))[:E]
    unused = None
    if values_are_free(x):
        order = order[: int(load_E.sum())]
    else:
        unused = (torch.arange(T * K, device=x.device) >= load_E.sum())[:, None]
    rows = x[order // K]
    if unused is not None:  # for the gradient, which a grouped product leaves undefined in unused rows
        rows = rows.masked_fill(unused, 0.0)
    gate, up = _grouped_linear(rows, gate_up, load_E).chunk(2, dim=1)
    rows = _grouped_linear(silu(gate) * up, down, load_E)
    if unused is not None:
        rows = rows.masked_fill(unused, 0.0)
    rows = rows * weight.flatten()[order, None]
    out = rows.new_zeros(T * K, x.shape[1]).index_copy(0, order, rows)
    return out.view(T, K, x.shape[1]).sum(1).to(x.dtype)


register_reference("moe_experts", moe_experts_reference)
