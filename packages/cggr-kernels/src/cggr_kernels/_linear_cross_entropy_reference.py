"""Cross-entropy of a head on chosen rows in plain torch, and the choice of rows that the op uses too."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_index: Tensor | None = None,
    row_weight: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    ignore_index: int = -100,
    reduction: str = "sum",
    max_logits: int | None = None,
) -> Tensor:
    """Plain-torch twin of :func:`cggr_kernels.linear_cross_entropy.linear_cross_entropy`, which its tests compare with.

    Args:
        hidden: Shape ``[N, H]``.
        weight: Shape ``[V, H]``.
        targets: Shape ``[N]``, int64.
        row_index: Shape ``[M]``, int64, or ``None``.
        row_weight: Shape ``[M]`` or ``[N]``, or ``None``.
        bias: Shape ``[V]``, or ``None``.
        softcap: Bound of the logits, or ``None``.
        scale: Factor on the logits, or ``None``.
        ignore_index: Target of rows that count for nothing.
        reduction: ``"sum"`` or ``"none"``.
        max_logits: Not used: all logits are held.

    Returns:
        The weighted losses ``[M]``, or their sum.
    """
    rows, targets, coefficient = kept_rows(hidden, targets, row_index, row_weight, ignore_index)
    logits_MV = torch.nn.functional.linear(rows, weight, bias).to(coefficient.dtype)
    logits_MV = logits_MV if scale is None else logits_MV * scale
    logits_MV = logits_MV if softcap is None else softcap * torch.tanh(logits_MV / softcap)
    safe_M = targets.masked_fill(coefficient == 0, -1)
    nll_M = torch.nn.functional.cross_entropy(logits_MV, safe_M, ignore_index=-1, reduction="none")
    return (nll_M * coefficient).sum() if reduction == "sum" else nll_M * coefficient


def kept_rows(
    hidden: Tensor, targets: Tensor, row_index: Tensor | None, row_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [M, H], targets [M] and coefficients [M] of the loss; 0 and zeros in rows that count for nothing."""
    row_index, targets, coefficient = used_rows(hidden, targets, row_index, row_weight, ignore_index)
    if row_index is not None:
        hidden = hidden.index_select(0, row_index)
    # Whatever a row of no weight holds must not reach the weight's gradient.
    return hidden.masked_fill((coefficient == 0)[:, None], 0), targets, coefficient


def used_rows(
    hidden: Tensor, targets: Tensor, row_index: Tensor | None, row_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Index [M] of the rows of the loss, all of them inside ``hidden``, their targets [M] and coefficients [M]."""
    N = hidden.shape[0]
    kind = torch.promote_types(hidden.dtype, torch.float32)
    if row_weight is not None:
        row_weight = row_weight.detach().to(kind)
    if row_index is not None:
        inside = (row_index >= 0) & (row_index < N)
        # No index may reach the device unclamped; one from outside makes the loss NaN.
        row_index = row_index.clamp(0, max(N - 1, 0))
        if row_weight is None:
            row_weight = torch.ones(row_index.shape, dtype=kind, device=hidden.device)
        elif row_weight.shape[0] == N and row_index.shape[0] != N:
            row_weight = row_weight.index_select(0, row_index)
        row_weight = row_weight.masked_fill(~inside, torch.nan)
        targets = targets.index_select(0, row_index)
    ignored = targets == ignore_index
    return row_index, targets, (~ignored).to(kind) if row_weight is None else row_weight.masked_fill(ignored, 0)
