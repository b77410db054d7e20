"""The rows of a head's cross-entropy, and the coefficient of each."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_rows(
    hidden: Tensor, targets: Tensor, row_index: Tensor | None, row_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [M, H], targets [M] and coefficients [M] of the loss; rows of weight 0 are zeroed."""
    row_index, targets, coefficient = used_rows(hidden, targets, row_index, row_weight, ignore_index)
    if row_index is not None:
        hidden = hidden.index_select(0, row_index)
    # A row of weight 0 must not reach the weight's gradient, whatever it holds.
    return hidden.masked_fill((coefficient == 0)[:, None], 0), targets, coefficient


def used_rows(
    hidden: Tensor, targets: Tensor, row_index: Tensor | None, row_weight: Tensor | None, ignore_index: int
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Index [M] of the rows of the loss, clamped to ``hidden``, their targets [M] and coefficients [M]."""
    N = hidden.shape[0]
    kind = torch.promote_types(hidden.dtype, torch.float32)
    if row_weight is not None:
        row_weight = row_weight.detach().to(kind)
    if row_index is not None:
        inside = (row_index >= 0) & (row_index < N)
        # No index reaches the device unclamped; an index out of range makes the loss NaN.
        row_index = row_index.clamp(0, max(N - 1, 0))
        if row_weight is None:
            row_weight = torch.ones(row_index.shape, dtype=kind, device=hidden.device)
        elif row_weight.shape[0] == N and row_index.shape[0] != N:
            row_weight = row_weight.index_select(0, row_index)
        row_weight = row_weight.masked_fill(~inside, torch.nan)
        targets = targets.index_select(0, row_index)
    ignored = targets == ignore_index
    return row_index, targets, (~ignored).to(kind) if row_weight is None else row_weight.masked_fill(ignored, 0)
