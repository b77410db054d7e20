"""The references of the ops ``difficulty`` and ``linear_difficulty``: five statistics of each row of logits.

On CPU they work on chunks that stay in the cache, so that five passes over a chunk cost about one pass over memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from cggr_core.backends import register_reference, resolve
from cggr_core.fp8 import product, quantize_rows
from cggr_core.head import accumulation_dtype, bounded_logits, head_logits

__all__ = [
    "FIELDS",
    "NEED_TARGETS",
    "difficulty_reference",
    "joined",
    "linear_difficulty_fp8",
    "linear_difficulty_reference",
    "wanted_fields",
]

FIELDS = ("entropy", "confidence", "margin", "nll", "gradnorm")
NEED_TARGETS = frozenset({"nll", "gradnorm"})

# Logits held at once, in elements. On CPU two float32 buffers of it fit a 4 MiB cache; a chunk of a head's product is
# larger because small matrix products are slow.
_CHUNK = 2**25
_CPU_CHUNK = 2**18
_CPU_HEAD_CHUNK = 2**22
_FP8_CHUNK = 2**29
# Devices read the scales of a chunk's rows from where it starts, which has to be aligned.
_FP8_ROWS = 128
_TOP2_BLOCK = 128
# exp() of it is 0 in float64 too, and 0 times it is 0, where 0 * -inf would be NaN.
_FLOOR = -1e4


def _top_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest and second largest entry of each row, in one pass and without sorting the row."""
    N, V = x.shape
    if V == 1:
        return x[:, 0], torch.full_like(x[:, 0], -torch.inf)
    if V < 4 * _TOP2_BLOCK:
        best = x.topk(2, dim=1).values
        return best[:, 0], best[:, 1]
    # The second largest is the largest of the second-best block or the second largest of the best block.
    whole = V - V % _TOP2_BLOCK
    blocks = x[:, :whole].unflatten(1, (-1, _TOP2_BLOCK))
    block_best = blocks.amax(2).topk(2, dim=1)
    best_block = blocks[torch.arange(N, device=x.device), block_best.indices[:, 0]]
    candidates = [best_block.topk(2, dim=1).values, block_best.values[:, 1:]]
    if whole < V:
        candidates.append(x[:, whole:].topk(min(2, V - whole), dim=1).values)
    best = torch.cat(candidates, dim=1).topk(2, dim=1).values
    return best[:, 0], best[:, 1]


class _Buffers:
    """Two scratch matrices that every chunk writes into, so that memory is allocated once."""

    def __init__(self, rows: int, like: Tensor, dtype: torch.dtype, second: bool) -> None:
        self.shifted = torch.empty(rows, like.shape[-1], dtype=dtype, device=like.device)
        self.exp = torch.empty_like(self.shifted) if second else self.shifted


def _chunk_statistics(
    x: Tensor, targets: Tensor | None, fields: Collection[str], buffers: _Buffers
) -> dict[str, Tensor]:
    """Statistics of the rows of ``x`` [n, V]; ``targets`` [n] are clamped into the vocabulary."""
    n, dtype = x.shape[0], buffers.shifted.dtype
    second = None
    if "margin" in fields:
        largest, second = _top_two(x)
    else:
        largest = x.amax(1)
    largest = largest.to(dtype)
    shifted = torch.sub(x, largest[:, None], out=buffers.shifted[:n])
    index = None if targets is None else targets[:, None]
    shifted_y = None if index is None else shifted.gather(1, index)[:, 0]
    if "entropy" in fields:
        shifted.clamp_(min=_FLOOR)
    e = torch.exp(shifted, out=buffers.exp[:n])
    out: dict[str, Tensor] = {}
    if "gradnorm" in fields and index is not None:
        # The target is taken out of both sums, because Σp² - 2p_y + 1 loses every digit as p_y nears 1.
        e_y = e.gather(1, index)[:, 0]
        e.scatter_(1, index, 0.0)
        others = e.sum(1)
        normaliser = others + e_y
        squares = torch.linalg.vector_norm(e, dim=1).square()
        out["gradnorm"] = (squares + others.square()).sqrt() / normaliser
        e.scatter_(1, index, e_y[:, None])
    else:
        normaliser = e.sum(1)
    log_normaliser = normaliser.log()
    if "confidence" in fields:
        out["confidence"] = normaliser.reciprocal()
    if second is not None:
        out["margin"] = (1.0 - (second.to(dtype) - largest).exp()) / normaliser
    if "nll" in fields and shifted_y is not None:
        out["nll"] = (log_normaliser - shifted_y).clamp_(min=0.0)
    if "entropy" in fields:
        weighted = shifted.mul_(e).sum(1)
        out["entropy"] = (log_normaliser - weighted / normaliser).clamp_(min=0.0)
    return out


def _chunk_rows(elements: int, vocab_size: int, rows: int) -> int:
    return max(1, min(rows, elements // max(1, vocab_size)))


def wanted_fields(fields: Collection[str] | None, has_targets: bool) -> list[str]:
    """The names in ``fields`` (None: all) that can be computed, in the order of :data:`FIELDS`."""
    asked = FIELDS if fields is None else [field for field in FIELDS if field in fields]
    return [field for field in asked if has_targets or field not in NEED_TARGETS]


def _finish(
    parts: dict[str, list[Tensor]], targets: Tensor | None, ignore_index: int, like: Tensor
) -> tuple[Tensor | None, ...]:
    """Join the chunks, put 0 where there is no target, and zeros for the statistics that need one."""
    ignored = None if targets is None else targets == ignore_index
    columns: list[Tensor | None] = []
    for field in FIELDS:
        if field not in parts:
            columns.append(None)
            continue
        column = torch.cat(parts[field]) if parts[field] else like.new_empty(0, dtype=accumulation_dtype(like.dtype))
        columns.append(column if ignored is None else column.masked_fill(ignored, 0.0))
    return tuple(columns)


def difficulty_reference(
    logits: Tensor,
    targets: Tensor | None = None,
    ignore_index: int = -100,
    fields: Collection[str] | None = None,
) -> tuple[Tensor | None, ...]:
    """Plain-torch op ``difficulty``: the five columns of :data:`FIELDS`, each [N], for ``logits`` [N, V].

    Kernels take the first three arguments and return five tensors; with ``fields``, this one leaves out (as None) what
    is not requested. Without targets, ``nll`` and ``gradnorm`` are zeros when ``fields`` is None.
    """
    N, V = logits.shape
    wanted = wanted_fields(fields, targets is not None)
    parts: dict[str, list[Tensor]] = {field: [] for field in wanted}
    dtype = accumulation_dtype(logits.dtype)
    small = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    rows = _chunk_rows(_CPU_CHUNK if small else _CHUNK, V, N)
    safe = None if targets is None else targets.clamp(0, V - 1)
    if N and wanted:
        buffers = _Buffers(rows, logits, dtype, "entropy" in wanted)
        for start in range(0, N, rows):
            chunk = slice(start, start + rows)
            found = _chunk_statistics(logits[chunk], None if safe is None else safe[chunk], wanted, buffers)
            for field in wanted:
                parts[field].append(found[field])
    if fields is None and targets is None:
        for field in NEED_TARGETS:
            parts[field] = [logits.new_zeros(N, dtype=dtype)]
    return _finish(parts, targets, ignore_index, logits)


def linear_difficulty_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    ignore_index: int = -100,
    fields: Collection[str] | None = None,
) -> tuple[Tensor | None, ...]:
    """Plain-torch op ``linear_difficulty``: as :func:`difficulty_reference`, the logits made chunk by chunk.

    Args:
        hidden: [N, H].
        weight: [V, H], of ``hidden``'s dtype.
        targets: [N] or None.
        bias: [V] or None.
        softcap: The logits are ``softcap * tanh(logits / softcap)``; None for none.
        scale: Factor on the logits before the softcap; None for 1.
        ignore_index: Target value of rows without a target.
        fields: As in :func:`difficulty_reference`.
    """
    N, V = hidden.shape[0], weight.shape[0]
    expected = FIELDS if fields is None else wanted_fields(fields, targets is not None)
    parts: dict[str, list[Tensor]] = {field: [] for field in expected}
    small = hidden.device.type == "cpu" and not torch.compiler.is_compiling()
    rows = _chunk_rows(_CPU_HEAD_CHUNK if small else _CHUNK, V, N)
    if N and parts:
        logits = torch.empty(rows, V, dtype=hidden.dtype, device=hidden.device)
        for start in range(0, N, rows):
            chunk = slice(start, start + rows)
            x = head_logits(hidden[chunk], weight, bias, softcap, scale, out=logits[: min(rows, N - start)])
            found = difficulty_reference(x, None if targets is None else targets[chunk], ignore_index, fields)
            for column, field in zip(found, FIELDS, strict=True):
                if column is not None and field in parts:
                    parts[field].append(column)
    return _finish(parts, targets, ignore_index, hidden)


def linear_difficulty_fp8(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
    ignore_index: int,
    fields: Collection[str] | None,
) -> tuple[Tensor | None, ...]:
    """:func:`linear_difficulty_reference` with the head's product in FP8, and logits rounded to bfloat16.

    Both factors are quantised as in :mod:`cggr_core.fp8`, which ``weight`` has to fit. A device without FP8 products
    emulates them.
    """
    N, V = hidden.shape[0], weight.shape[0]
    rows = -(-_chunk_rows(_FP8_CHUNK, V, N) // _FP8_ROWS) * _FP8_ROWS
    (x, x_scale), (w, w_scale) = quantize_rows(hidden), quantize_rows(weight)
    op = resolve("difficulty", hidden.device.type)
    extra = (fields,) if op is difficulty_reference else ()
    chunks = []
    for start in range(0, N, rows):
        chunk = slice(start, start + rows)
        logits = bounded_logits(product(x[chunk], x_scale[chunk], w, w_scale, bias), softcap, scale)
        chunks.append(op(logits, None if targets is None else targets[chunk], ignore_index, *extra))
    return joined(chunks)


def joined(chunks: Sequence[tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """What one of the ops returns for the rows of at least one chunk, from what it returned for each."""
    if len(chunks) == 1:
        return chunks[0]
    return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True))


register_reference("difficulty", difficulty_reference)
register_reference("linear_difficulty", linear_difficulty_reference)
