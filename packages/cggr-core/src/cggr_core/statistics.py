"""Token statistics from logits, or from hidden states and a head that is applied in chunks of rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cggr_core.backends import resolve
from cggr_core.checks import check_choice, check_float, check_targets, values_are_free
from cggr_core.difficulty import (
    FIELDS,
    NEED_TARGETS,
    difficulty_reference,
    joined,
    linear_difficulty_fp8,
    linear_difficulty_reference,
    wanted_fields,
)
from cggr_core.fp8 import fits
from cggr_core.head import check_head, has_flat_rows, head_operands
from cggr_core.settings import CONTEXT_PRECISIONS

__all__ = ["TokenStatistics", "linear_token_statistics", "token_statistics"]


class TokenStatistics(NamedTuple):
    """What the model's next-token distribution p says about each token.

    The fields are float32 (float64 for float64 logits) with the leading shape of the logits, or None if not requested.
    Rows whose target is the ignore index hold 0 in every field.

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


@torch.no_grad()
def token_statistics(
    logits: Tensor,
    targets: Tensor | None = None,
    *,
    ignore_index: int = -100,
    fields: Collection[str] | None = None,
) -> TokenStatistics:
    """Statistics of the next-token distribution at every position.

    Computed over chunks of rows, so the extra memory does not grow with the number of tokens. Not differentiable.

    Args:
        logits: Unnormalised log-probabilities, shape [..., V], any floating dtype and strides. -inf is a probability
            of 0.
        targets: Class indices, shape [...], already aligned with the logits (the target at position t is what the
            logits at t predict), or None: then ``nll`` and ``gradnorm`` are None.
        ignore_index: Target value of positions to ignore; they get 0 in every field.
        fields: Names of the statistics to compute; None for all that are possible.

    Returns:
        :class:`TokenStatistics`; float32 whatever the dtype of the logits (float64 for float64).

    Raises:
        TypeError: If ``logits`` is not floating or ``targets`` not integer.
        ValueError: If shapes or devices disagree, a field is unknown, or (on CPU) a target is outside the vocabulary
            or a row of logits is NaN. On other devices targets are clamped and NaN propagates: see
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
    return _as_statistics(joined(parts), shape, fields, targets is not None, V, "logits")


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
    precision: str | None = None,
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
        precision: ``"fp8"`` computes the product in FP8 (e4m3, one scale per row of both factors) and rounds the logits
            to bfloat16, unless they are float64, a size is not a multiple of 16 or ``weight`` is sharded; ``None`` for
            the operands' own.

    Returns:
        :class:`TokenStatistics` with the leading shape of ``hidden``.

    Raises:
        TypeError: If a dtype is wrong, or those of ``hidden`` and ``weight`` differ outside of autocast.
        ValueError: As in :func:`token_statistics`, or if ``weight`` or ``bias`` do not match ``hidden``, or
            ``precision`` is unknown.

    Example:
        >>> linear_token_statistics(torch.zeros(2, 5, 8), torch.zeros(16, 8)).entropy.shape
        torch.Size([2, 5])
    """
    check_head(hidden, weight, bias, softcap, scale)
    shape, V = tuple(hidden.shape[:-1]), weight.shape[0]
    if targets is not None:
        targets = check_targets("targets", targets, shape, V, ignore_index, hidden, "hidden").reshape(-1)
    _check_fields(fields, targets is not None)
    if precision is not None:
        check_choice("precision", precision, CONTEXT_PRECISIONS)
    hidden, weight, bias = head_operands(hidden.detach(), weight.detach(), bias)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if precision is not None and fits(weight) and rows.shape[0]:
        columns = linear_difficulty_fp8(rows, weight, targets, bias, softcap, scale, ignore_index, fields)
        return _as_statistics(columns, shape, fields, targets is not None, V, "logits (of hidden and weight, in FP8)")
    op = resolve("linear_difficulty", hidden.device.type, hidden.dtype)
    extra = (fields,) if op is linear_difficulty_reference else ()
    columns = op(rows, weight, targets, bias, softcap, scale, ignore_index, *extra)
    return _as_statistics(columns, shape, fields, targets is not None, V, "logits (of hidden and weight)")


def _row_views(tensor: Tensor) -> Iterator[Tensor]:
    """Two-dimensional views of the rows of ``tensor`` in order, without a copy (a sliced batch has no flat view)."""
    if tensor.dim() == 2:
        yield tensor
        return
    if tensor.dim() == 1:
        yield tensor.unsqueeze(0)
        return
    if 0 in tensor.shape[:-1]:
        return
    if has_flat_rows(tensor):
        yield tensor.view(-1, tensor.shape[-1])
        return
    for part in tensor.unbind(0):
        yield from _row_views(part)


def _check_fields(fields: Collection[str] | None, has_targets: bool) -> None:
    for field in fields or ():
        check_choice("fields", field, FIELDS)
        if field in NEED_TARGETS and not has_targets:
            raise ValueError(
                f"field {field!r} needs targets, but none were given; pass targets, or leave it out of fields"
            )


def _as_statistics(
    columns: tuple[Tensor | None, ...],
    shape: tuple[int, ...],
    fields: Collection[str] | None,
    has_targets: bool,
    vocab_size: int,
    what: str,
) -> TokenStatistics:
    wanted = wanted_fields(fields, has_targets)
    named = {
        field: None if column is None or field not in wanted else column.reshape(shape)
        for field, column in zip(FIELDS, columns, strict=True)
    }
    present = next((column for column in named.values() if column is not None), None)
    if present is not None and values_are_free(present):
        bad = int(present.isnan().sum())
        if bad:
            raise ValueError(
                f"{what} are NaN, or have no finite maximum, at {bad} of {present.numel()} positions; look for an "
                "overflow or a bad learning rate before this step"
            )
    return TokenStatistics(**named, vocab_size=vocab_size)
