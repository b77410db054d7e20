"""Weighted sum of the cross-entropy of a head on chosen rows, with the gradients computed in the forward pass.

The gradient buffers double as scratch space until they are written, so hardly any other memory is needed:

- The gradient of all hidden states holds the chosen rows, their gradient in float32, and a chunk of logits.
- The gradient of the weight is written from the first class to the last. Logits that fit into the part not yet written
  are kept there instead of being computed twice. The last classes hold the wider of two chunks.

With enough memory, all logits can be held at once: a single chunk, and three matrix products instead of four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_kernels._linear_cross_entropy_chunks import (
    Gradients,
    chunk_columns,
    chunks,
    differentiate,
    finish_state,
    raw_logits,
    read_logits,
    start_state,
)

# Elements copied at a time from the gradient of the chosen rows to that of all rows.
SPREAD_ELEMENTS = 2**19
_SPREAD_COLUMNS = 32
_ALIGNMENT = 128


class _Workspace:
    """Hands out the unwritten memory of a result, from the front."""

    def __init__(self, result: Tensor) -> None:
        self.free = result.view(-1)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialized tensor in the free part, or in new memory if that is too small."""
        elements = torch.Size(shape).numel() * dtype.itemsize // self.free.element_size()
        if elements > self.free.numel():
            return torch.empty(shape, dtype=dtype, device=self.free.device)
        taken = self.free[:elements].view(dtype).view(shape)
        self.free = self.free[-(-elements // _ALIGNMENT) * _ALIGNMENT :]
        return taken


def _plan(
    M: int, V: int, columns: int, d_weight: Tensor, workspace: _Workspace
) -> tuple[list[tuple[int, int, Tensor]], int]:
    """Chunks of classes with the buffer for each chunk's gradient, and where in ``d_weight`` the first buffer begins.

    If there is room for half a chunk more, the last classes' part of ``d_weight`` is the buffer of all other chunks.
    """
    if d_weight.numel() and columns // 2 <= workspace.free.numel() // M < columns:
        H = d_weight.shape[1]
        tail = V - -(-M * columns // H)
        if tail > 0:
            wide = d_weight[tail:].view(-1)[: M * columns]
            narrow = workspace.take((M * (columns // 2),), d_weight.dtype)
            plan = [(start, end, wide) for start, end in chunks(0, tail, columns)]
            return plan + [(start, end, narrow) for start, end in chunks(tail, V, columns // 2)], tail * H
    buffer = workspace.take((M * columns,), workspace.free.dtype)
    return [(start, end, buffer) for start, end in chunks(0, V, columns)], d_weight.numel()


def _scatter_rows(d_rows: Tensor, d_hidden: Tensor, row_index: Tensor | None) -> None:
    """Write the rows' gradient [M, H] float32 into ``d_hidden`` [N, H], in which it may lie past the first M rows.

    Copies a few columns at a time, so that the rows' gradient never exists twice.
    """
    M, H = d_rows.shape
    if row_index is None:
        d_hidden.copy_(d_rows)
        return
    if d_hidden.shape[0] >= M:
        d_rows = d_hidden[:M].copy_(d_rows)
    columns = max(_SPREAD_COLUMNS, SPREAD_ELEMENTS // M)
    for start, end in chunks(0, H, columns):
        some = d_rows[:, start:end].to(d_hidden.dtype, copy=True)
        d_hidden[:, start:end].zero_().index_add_(0, row_index, some)
        del some


def _add_chunks(
    gradients: Gradients,
    targets: Tensor,
    bias: Tensor | None,
    coefficient: Tensor,
    softcap: float | None,
    scale: float | None,
    columns: int,
    workspace: _Workspace,
) -> Tensor:
    """Losses [M] of the rows; adds their gradients to ``gradients``."""
    rows, weight, d_weight = gradients.rows, gradients.weight, gradients.d_weight
    M, (V, H) = rows.shape[0], weight.shape
    plan, limit = _plan(M, V, columns, d_weight, workspace)
    state_3M = start_state(M, rows.device)
    kept, occupied = {}, 0
    for start, end, buffer in plan:
        # Logits may share memory with the gradient of their own and later classes: they are consumed before it is
        # written.
        place = d_weight.view(-1)[start * H : limit]
        fits = start * H >= occupied and place.numel() >= M * (end - start)
        raw = raw_logits(place if fits else buffer, rows, weight, bias, start, end)
        if fits or len(plan) == 1:
            kept[start] = raw
            occupied = start * H + raw.numel()
        read_logits(raw, targets, state_3M, start, end, softcap, scale)
    nll_M, lse_M = finish_state(state_3M)
    for start, end, buffer in plan:
        raw = kept.pop(start) if start in kept else raw_logits(buffer, rows, weight, bias, start, end)
        gradients.add(differentiate(raw, buffer, targets, lse_M, coefficient, start, softcap, scale), start, end)
    return nll_M


def launch_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_index: Tensor | None,
    bias: Tensor | None,
    coefficient: Tensor,
    softcap: float | None,
    scale: float | None,
    max_logits: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    M, (V, H) = targets.shape[0], weight.shape
    d_hidden = hidden.new_empty(hidden.shape if needs[0] else 0)
    workspace = _Workspace(d_hidden)
    rows = workspace.take((M, H), hidden.dtype)
    if row_index is None:
        rows.copy_(hidden)
    else:
        torch.index_select(hidden, 0, row_index, out=rows)
    # A row of weight 0 must not reach the weight's gradient, whatever it holds.
    rows.masked_fill_((coefficient == 0)[:, None], 0)
    d_rows = workspace.take((M, H) if needs[0] else (0,), torch.float32)
    gradients = Gradients(rows, weight, needs, d_rows)
    columns = V if max_logits >= M * V else chunk_columns(M, V)
    nll_M = _add_chunks(gradients, targets, bias, coefficient, softcap, scale, columns, workspace)
    if needs[0]:
        _scatter_rows(d_rows, d_hidden, row_index)
    return nll_M, d_hidden, gradients.d_weight, gradients.d_bias.to(hidden.dtype)


def fake_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_index: Tensor | None,
    bias: Tensor | None,
    coefficient: Tensor,
    softcap: float | None,
    scale: float | None,
    max_logits: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    grads = (hidden.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))
    d_hidden, d_weight, d_bias = grads
    return targets.new_empty(targets.shape, dtype=torch.float32), d_hidden, d_weight, d_bias
