"""What the experts compute: the reference of the op ``moe_experts``.

The choices are sorted by expert; each expert's rows are then one block of a grouped matrix product, which torch has for
some devices and dtypes, and which is a loop over the experts elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu

from cggr_core.backends import register_reference
from cggr_core.checks import values_are_free

__all__ = ["moe_experts_reference"]

_GROUPED_DEVICES = ("cpu", "cuda")
_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ALIGNMENT = 16  # bytes between rows, what torch's grouped product asks for


def _has_grouped_mm(rows: Tensor, weight: Tensor) -> bool:
    aligned = all(size * weight.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])
    return rows.device.type in _GROUPED_DEVICES and weight.dtype in _GROUPED_DTYPES and aligned


def _grouped_linear(rows: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    """``rows`` [N, A], sorted by expert, times ``weight`` [E, B, A]: [N, B].

    Rows beyond the sum of ``load`` [E] come out undefined.
    """
    if _has_grouped_mm(rows, weight):
        return grouped_mm(rows, weight.transpose(1, 2), offs=load.cumsum(0).int())
    parts = rows.split([*load.tolist(), rows.shape[0] - int(load.sum())])
    return torch.cat([part @ w.t() for part, w in zip(parts, (*weight, weight[0]), strict=True)])


def moe_experts_reference(x: Tensor, gate_up: Tensor, down: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Plain-torch op ``moe_experts``: ``out[t] = Σ_k weight[t, k] · (silu(g) · u) @ down[e].T``.

    With ``e = index[t, k]`` and ``g, u`` the halves of ``x[t] @ gate_up[e].T``. It is summed in float32 at least, in
    the order of k.

    Args:
        x: ``[T, H]``.
        gate_up: ``[E, 2I, H]``, the gate's rows first.
        down: ``[E, H, I]``.
        index: ``[T, K]``, int64, the expert of each choice; a negative one is null, contributes nothing and costs
            nothing.
        weight: ``[T, K]``, float32 or float64.

    Returns:
        ``[T, H]``, dtype of ``x``; differentiable in ``x``, ``gate_up``, ``down`` and ``weight``.
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
    if unused is not None:  # here for the gradient, which a grouped product leaves undefined in unused rows
        rows = rows.masked_fill(unused, 0.0)
    gate, up = _grouped_linear(rows, gate_up, load_E).chunk(2, dim=1)
    rows = _grouped_linear(silu(gate) * up, down, load_E)
    if unused is not None:
        rows = rows.masked_fill(unused, 0.0)
    rows = rows * weight.flatten()[order, None]
    out = rows.new_zeros(T * K, x.shape[1]).index_copy(0, order, rows)
    return out.view(T, K, -1).sum(1).to(x.dtype)


register_reference("moe_experts", moe_experts_reference)
