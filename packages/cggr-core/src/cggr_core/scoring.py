"""Token statistics and scores from logits, or from hidden states and a head that is applied in chunks of rows.

The torch code here is the reference of the ops ``difficulty`` and ``linear_difficulty``. On CPU it works on chunks
that stay in the cache, so that its five passes over a chunk cost about one pass over memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cggr_core.backends import register_reference, resolve
from cggr_core.checks import check_choice, check_float, check_same_device, check_shape, check_targets, values_are_free
from cggr_core.precision import accumulation_dtype, head_operands

__all__ = [
    "FIELDS",
    "SCORINGS",
    "TokenStatistics",
    "fields_for",
    "linear_token_statistics",
    "score",
    "token_statistics",
]

FIELDS = ("entropy", "confidence", "margin", "nll", "gradnorm")
SCORINGS = ("entropy", "margin", "loss", "combined", "gradnorm", "excess")
_NEED_TARGETS = frozenset({"nll", "gradnorm"})
_FIELDS_OF = {
    "entropy": ("entropy",),
    "margin": ("margin",),
    "loss": ("nll",),
    "combined": ("entropy", "margin", "nll"),
    "gradnorm": ("gradnorm",),
    "excess": ("nll",),
}

# Logits held at once, in elements. On CPU two float32 buffers of it fit a 4 MiB cache; a chunk of a head's product is
# larger because small matrix products are slow.
_CHUNK = 2**25
_CPU_CHUNK = 2**18
_CPU_HEAD_CHUNK = 2**21
_TOP2_BLOCK = 128
# exp() of it is 0 in float64 too, and 0 times it is 0, where 0 * -inf would be NaN.
_FLOOR = -1e4


class TokenStatistics(NamedTuple):
    """What the model's next-token distribution p says about each token.

    The fields are float32 (float64 for float64 logits) with the leading shape of the logits, or None where not asked
    for. Rows whose target is the ignore index hold 0 in every field.

    Attributes:
        entropy: -Σ p ln p, in nats, in [0, ln V].
        confidence: Probability of the likeliest token, in [1/V, 1].
        margin: Probability of the likeliest token minus that of the second, in [0, 1].
        nll: -ln p of the target, in nats.
        gradnorm: Norm of the gradient of the nll with respect to the logits, ‖p - onehot(target)‖₂, in [0, √2].
        vocab_size: V.
    """

    entropy: Tensor | None
    confidence: Tensor | None
    margin: Tensor | None
    nll: Tensor | None
    gradnorm: Tensor | None
    vocab_size: int


def fields_for(scoring: str, has_targets: bool = True) -> frozenset[str]:
    """The statistics that a scoring needs.

    Args:
        scoring: One of :data:`SCORINGS`.
        has_targets: Whether targets are at hand; without them ``combined`` does without the nll.

    Returns:
        Field names of :class:`TokenStatistics`.

    Raises:
        ValueError: If the scoring is unknown, or needs targets that are not there.

    Example:
        >>> sorted(fields_for("combined", has_targets=False))
        ['entropy', 'margin']
    """
    fields = frozenset(_FIELDS_OF[check_choice("scoring", scoring, SCORINGS)])
    if has_targets:
        return fields
    if scoring == "combined":
        return fields - _NEED_TARGETS
    if fields & _NEED_TARGETS:
        raise ValueError(
            f"scoring={scoring!r} needs targets and there are none; pass targets, or use 'entropy', 'margin' or "
            f"'combined', which do without"
        )
    return fields


def _row_views(tensor: Tensor) -> Iterator[Tensor]:
    """Two-dimensional views of the rows of ``tensor`` in order, without copying (a sliced batch cannot be flattened)."""
    if tensor.dim() == 2:
        yield tensor
        return
    if tensor.dim() == 1:
        yield tensor.unsqueeze(0)
        return
    if 0 in tensor.shape[:-1]:
        return
    strides = tensor.stride()
    if all(strides[i] == strides[i + 1] * tensor.shape[i + 1] for i in range(tensor.dim() - 2)):
        yield tensor.view(-1, tensor.shape[-1])
        return
    for part in tensor.unbind(0):
        yield from _row_views(part)


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
    """Two scratch matrices that every chunk writes into, so that memory is asked for once."""

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


def _wanted(fields: Collection[str] | None, has_targets: bool) -> list[str]:
    return [field for field in FIELDS if (fields is None or field in fields) and (has_targets or field not in _NEED_TARGETS)]


def _finish(
    parts: dict[str, list[Tensor]], targets: Tensor | None, ignore_index: int, like: Tensor, rows: int
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
    logits: Tensor, targets: Tensor | None, ignore_index: int, fields: Collection[str] | None = None
) -> tuple[Tensor | None, ...]:
    """Plain-torch op ``difficulty``: the five columns of :data:`FIELDS`, each [N], for ``logits`` [N, V].

    Kernels take the first three arguments and return five tensors; ``fields`` lets this one leave out (as None) what
    nobody asked for. Without targets, ``nll`` and ``gradnorm`` are zeros when ``fields`` is None.
    """
    N, V = logits.shape
    wanted = _wanted(fields, targets is not None)
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
        for field in _NEED_TARGETS:
            parts[field] = [logits.new_zeros(N, dtype=dtype)]
    return _finish(parts, targets, ignore_index, logits, N)


def linear_difficulty_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
    ignore_index: int,
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
    parts: dict[str, list[Tensor]] = {field: [] for field in (FIELDS if fields is None else _wanted(fields, targets is not None))}
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
    return _finish(parts, targets, ignore_index, hidden, N)


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
    out: Tensor | None = None,
) -> Tensor:
    """``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``, in place in ``out`` where it is given."""
    x = torch.mm(hidden, weight.t(), out=out)
    if bias is not None:
        x.add_(bias)
    if scale is not None and scale != 1.0:
        x.mul_(scale)
    if softcap is not None:
        x.div_(softcap).tanh_().mul_(softcap)
    return x


register_reference("difficulty", difficulty_reference)
register_reference("linear_difficulty", linear_difficulty_reference)


def _check_fields(fields: Collection[str] | None, has_targets: bool) -> None:
    for field in fields or ():
        check_choice("fields", field, FIELDS)
        if field in _NEED_TARGETS and not has_targets:
            raise ValueError(f"field {field!r} needs targets and there are none; pass targets, or leave it out of fields")


def _as_statistics(
    columns: tuple[Tensor | None, ...],
    shape: tuple[int, ...],
    fields: Collection[str] | None,
    has_targets: bool,
    vocab_size: int,
    what: str,
) -> TokenStatistics:
    wanted = _wanted(fields, has_targets)
    named = {
        field: None if column is None or field not in wanted else column.reshape(shape)
        for field, column in zip(FIELDS, columns, strict=True)
    }
    present = next((column for column in named.values() if column is not None), None)
    if present is not None and values_are_free(present):
        bad = int(present.isnan().sum())
        if bad:
            raise ValueError(
                f"{what} are NaN, or have no largest finite value, at {bad} of {present.numel()} positions; "
                f"look for an overflow or a bad learning rate before this step"
            )
    return TokenStatistics(**named, vocab_size=vocab_size)


@torch.no_grad()
def token_statistics(
    logits: Tensor,
    targets: Tensor | None = None,
    *,
    ignore_index: int = -100,
    fields: Collection[str] | None = None,
) -> TokenStatistics:
    """Statistics of the next-token distribution at every position.

    Works on chunks of rows: the extra memory does not grow with the number of tokens. Nothing here is differentiable.

    Args:
        logits: Unnormalised log-probabilities, shape [..., V], any floating dtype and strides. -inf is a probability
            of 0.
        targets: Class indices, shape [...], already aligned with the logits (the target at position t is what the
            logits at t predict), or None: then ``nll`` and ``gradnorm`` are None.
        ignore_index: Target value of positions that count for nothing; they get 0 in every field.
        fields: Names of the statistics to compute; None for all that are possible.

    Returns:
        :class:`TokenStatistics`; float32 whatever the dtype of the logits (float64 for float64).

    Raises:
        TypeError: If ``logits`` is not floating or ``targets`` not integer.
        ValueError: If shapes or devices disagree, a field is unknown, or (on CPU) a target is outside the vocabulary
            or a row of logits is NaN. On other devices targets are clamped and NaN goes through: see
            :func:`cggr_core.checks.count_bad_targets`.

    Example:
        >>> logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
        >>> round(token_statistics(logits).margin.item(), 4)
        0.25
    """
    check_float("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V of at least 1, got shape {tuple(logits.shape)}")
    shape, V = tuple(logits.shape[:-1]), logits.shape[-1]
    if targets is not None:
        targets = check_targets("targets", targets, shape, V, ignore_index, logits, "logits")
    _check_fields(fields, targets is not None)
    logits = logits.detach()
    op = resolve("difficulty", logits.device.type, logits.dtype)
    extra = (fields,) if op is difficulty_reference else ()
    parts, start = [], 0
    flat_targets = None if targets is None else targets.reshape(-1)
    for rows in _row_views(logits):
        stop = start + rows.shape[0]
        parts.append(op(rows, None if flat_targets is None else flat_targets[start:stop], ignore_index, *extra))
        start = stop
    if not parts:
        parts.append(op(logits.new_empty(0, V), None if flat_targets is None else flat_targets, ignore_index, *extra))
    columns = parts[0] if len(parts) == 1 else tuple(
        None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
    )
    return _as_statistics(columns, shape, fields, targets is not None, V, "logits")


@torch.no_grad()
def linear_token_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    ignore_index: int = -100,
    fields: Collection[str] | None = None,
) -> TokenStatistics:
    """:func:`token_statistics` of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``.

    The logits exist for a chunk of rows at a time, never as [N, V]. Under autocast the product runs in its dtype.

    Args:
        hidden: Final hidden states (after the last norm), shape [..., H].
        weight: The head's matrix, shape [V, H].
        targets: As in :func:`token_statistics`.
        bias: The head's bias, shape [V].
        softcap: Bound of the logits (Gemma 2's ``final_logit_softcapping``); None for none.
        scale: Factor on the logits (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``); None for 1.
        ignore_index: As in :func:`token_statistics`.
        fields: As in :func:`token_statistics`.

    Returns:
        :class:`TokenStatistics` with the leading shape of ``hidden``.

    Raises:
        TypeError: If a dtype is wrong, or those of ``hidden`` and ``weight`` differ outside of autocast.
        ValueError: As in :func:`token_statistics`, or if ``weight`` or ``bias`` do not fit ``hidden``.

    Example:
        >>> linear_token_statistics(torch.zeros(2, 5, 8), torch.zeros(16, 8)).entropy.shape
        torch.Size([2, 5])
    """
    check_head(hidden, weight, bias, softcap, scale)
    shape, V = tuple(hidden.shape[:-1]), weight.shape[0]
    if targets is not None:
        targets = check_targets("targets", targets, shape, V, ignore_index, hidden, "hidden").reshape(-1)
    _check_fields(fields, targets is not None)
    hidden, weight, bias = head_operands(hidden.detach(), weight.detach(), bias)
    op = resolve("linear_difficulty", hidden.device.type, hidden.dtype)
    extra = (fields,) if op is linear_difficulty_reference else ()
    rows = hidden.reshape(-1, hidden.shape[-1])
    columns = op(rows, weight, targets, bias, softcap, scale, ignore_index, *extra)
    return _as_statistics(columns, shape, fields, targets is not None, V, "logits (of hidden and weight)")


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, scale: float | None
) -> None:
    """Raise unless ``hidden`` [..., H], ``weight`` [V, H] and ``bias`` [V] belong together."""
    check_float("hidden", hidden)
    check_float("weight", weight)
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be [V, H] with the H of hidden [..., H], got weight {tuple(weight.shape)} and hidden "
            f"{tuple(hidden.shape)}"
        )
    check_same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        check_shape("bias", check_float("bias", bias), (weight.shape[0],), "one per row of weight")
        check_same_device("bias", bias, "hidden", hidden)
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a finite number above 0, or None, got {value!r}")


def score(statistics: TokenStatistics, *, scoring: str, reference_nll: Tensor | None = None) -> Tensor:
    """One number per token, higher = harder = more worth learning from.

    ========== ===========================================================================
    scoring    score
    ========== ===========================================================================
    entropy    entropy
    margin     1 - margin
    loss       nll
    combined   entropy / ln V + (1 - margin) + nll / ln V (without targets the first two)
    gradnorm   gradnorm, the best of these for weighted sampling
    excess     nll - reference_nll (Mindermann et al. 2022; Lin et al. 2024, *Rho-1*)
    ========== ===========================================================================

    Args:
        statistics: From :func:`token_statistics`, with the fields of :func:`fields_for`.
        scoring: One of :data:`SCORINGS`.
        reference_nll: For ``excess``: a reference model's nll of each token, in nats, shape of the statistics.

    Returns:
        float32, shape of the statistics. At ignored positions the value says nothing.

    Raises:
        ValueError: If the scoring is unknown or a statistic or ``reference_nll`` that it needs is missing.

    Example:
        >>> statistics = token_statistics(torch.tensor([[4.0, 0.0], [1.0, 0.0]]))
        >>> bool(score(statistics, scoring="entropy").diff() > 0)
        True
    """
    check_choice("scoring", scoring, SCORINGS)
    if reference_nll is not None and scoring != "excess":
        raise ValueError(f"reference_nll is used by scoring='excess' alone, got scoring={scoring!r}")

    def field(name: str) -> Tensor:
        value: Tensor | None = getattr(statistics, name)
        if value is None:
            raise ValueError(
                f"scoring={scoring!r} needs the statistic {name!r}, which was not computed; pass "
                f"fields=fields_for({scoring!r}) (or None) and targets to token_statistics"
            )
        return value

    log_v = math.log(max(2, statistics.vocab_size))
    if scoring == "entropy":
        result = field("entropy")
    elif scoring == "margin":
        result = 1.0 - field("margin")
    elif scoring == "loss":
        result = field("nll")
    elif scoring == "combined":
        result = field("entropy") / log_v + (1.0 - field("margin"))
        if statistics.nll is not None:
            result = result + statistics.nll / log_v
    elif scoring == "gradnorm":
        result = field("gradnorm")
    else:
        nll = field("nll")
        if reference_nll is None:
            raise ValueError("scoring='excess' needs reference_nll: a reference model's nll of each token, in nats")
        check_float("reference_nll", reference_nll)
        check_shape("reference_nll", reference_nll, nll.shape, "one per token")
        check_same_device("reference_nll", reference_nll, "statistics", nll)
        result = nll - reference_nll.detach()
    return result.float()
