"""The passes that each gradient mode runs over a batch and its kept tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_core.checks import check_choice, check_targets
from cggr_core.logprobs.kept import Kept, all_tokens, kept_tokens
from cggr_core.logprobs.shared_context import SharedContext, SharedRun
from cggr_core.selection import Selection
from cggr_core.settings import ENGINES, GRADIENT_MODES, check_context_precision
from cggr_core.targets import at_predictors

if TYPE_CHECKING:
    from cggr_core.routing import Engine, TokenInputs

__all__ = ["RoutedPasses", "Values", "aligned_targets", "check_mode"]

MODES = tuple(mode for mode in GRADIENT_MODES if mode != "sequence")

# Arguments that request more than hidden states from a forward; caches and partial logits do not apply here.
_NOT_INPUTS = ("labels", "past_key_values", "cache", "use_cache", "logits_to_keep", "num_logits_to_keep", "return_dict")


def check_mode(
    gradient_mode: str,
    engine: str | None,
    context_precision: str | None,
    *,
    everywhere: bool,
    inputs: dict[str, Any],
) -> None:
    """Raise unless the settings of a call exist and can be combined.

    Raises:
        ValueError: If a name is unknown, or a setting would have no effect.
    """
    if gradient_mode == "sequence":
        raise ValueError(
            "gradient_mode='sequence' is not available here: rows without a kept token are left out in every mode, so "
            "use gradient_mode='exact'"
        )
    check_choice("gradient_mode", gradient_mode, MODES)
    check_context_precision(context_precision, "gradient_mode", gradient_mode)
    if engine is not None:
        check_choice("engine", engine, ENGINES)
        if gradient_mode == "exact":
            raise ValueError(
                f"engine={engine!r} applies to gradient_mode='kv' and 'detached', but gradient_mode is 'exact'; leave "
                "engine=None"
            )
        if everywhere and engine == "interleaved":
            raise ValueError(
                "engine='interleaved' never runs other tokens up to the head, but everywhere=True requests their "
                "log-probabilities; use engine='two_pass', or leave engine=None"
            )
    unwanted = [name for name in inputs if name in _NOT_INPUTS or name.startswith("output_")]
    if unwanted:
        raise ValueError(
            f"{', '.join(unwanted)}: not an input of tokens, and not used here; leave it out (targets= takes the token "
            "that each position predicts)"
        )


def aligned_targets(targets: Tensor | None, batch: TokenInputs, *, shifted: bool, vocab_size: int) -> Tensor:
    """Targets of every position, int64 ``[B, S]``, -100 where there is none.

    Args:
        targets: The caller's aligned targets; ``None`` for the next input token of the same document.
        batch: The inputs.
        shifted: Whether the model predicts the next token.
        vocab_size: Targets are 0 to ``vocab_size - 1``.

    Raises:
        TypeError: If the targets are not integers.
        ValueError: If they are required but missing, their shape or device is wrong, or (on CPU) one is outside the
            vocabulary.
    """
    like = batch.position_ids
    if targets is not None:
        return check_targets("targets", targets, batch.shape, vocab_size, -100, like, "the input")
    if not shifted:
        raise ValueError(
            "targets must be given for a masked language model: int64 [B, S], the token that each position predicts, "
            "-100 for none"
        )
    input_ids = batch.per_token.get("input_ids")
    if input_ids is None:
        raise ValueError(
            "targets must be given with inputs_embeds: int64 [B, S], at position t the token at t + 1, -100 for none"
        )
    tokens = at_predictors(input_ids.long(), -100)
    if batch.padding is not None:
        tokens = tokens.masked_fill(at_predictors(batch.padding.long(), 0) == 0, -100)
    if batch.segment is not None:
        tokens = tokens.masked_fill(at_predictors(batch.segment, -1) != batch.segment, -100)
    return tokens


@dataclass(frozen=True)
class Values:
    """Results of the passes.

    Attributes:
        kept: Which tokens were kept.
        at_kept: Head values ``[R, K, ...]`` of the kept tokens, with gradients.
        everywhere: Head values ``[B, S, ...]`` without gradients, if requested.
        auxiliary_loss: Of the model's expert routers, if there is one.
    """

    kept: Kept
    at_kept: Tensor
    everywhere: Tensor | None
    auxiliary_loss: Tensor | None


class RoutedPasses:
    """One call's inputs and mode, over the engine of a model.

    Args:
        passes: The engine.
        arguments: Inputs of the model's forward, as given by the caller; ``None`` for omitted ones.
        gradient_mode: One of :data:`MODES`; without gradients (``torch.no_grad``) every mode is one plain forward.
        engine: One of :data:`ENGINES`, or ``None``.
        context_precision: One of :data:`CONTEXT_PRECISIONS`, or ``None``.
        hidden: Return the head's input even if the head is not one matrix.
        context: The context before the rows, or ``None``.
    """

    def __init__(
        self,
        passes: Engine,
        arguments: dict[str, Any],
        *,
        gradient_mode: str,
        engine: str | None,
        context_precision: str | None,
        hidden: bool,
        context: SharedContext | None,
    ) -> None:
        self._passes = passes
        self._arguments = {name: value for name, value in arguments.items() if value is not None}
        self._routing = gradient_mode != "exact" and torch.is_grad_enabled()
        self._gradient_mode = gradient_mode
        self._keep_graph = gradient_mode == "kv"
        self._engine = engine
        self._precision = context_precision
        self._hidden = hidden
        self._context = context
        if context is None:
            self.batch = passes.inputs(**self._arguments)
            passes.prepare(self.batch, routing=self._routing)
        else:
            if not isinstance(context, SharedContext):
                raise TypeError(f"context must be a SharedContext, got {type(context).__name__}")
            context.check(self._arguments)
            shared = SharedRun(passes, context, self._arguments)
            self.batch = shared.batch
            shared.prepare()

    def run(self, keep: Tensor | Selection, targets: Tensor | None, *, everywhere: bool) -> Values:
        """Run the passes.

        Args:
            keep: As in :func:`kept_tokens`.
            targets: int64 ``[B, S]``, for the checks of ``keep``; ``None`` if not needed.
            everywhere: Whether to return values of other tokens too.
        """
        kept = kept_tokens(keep, self.batch, targets, every_row=everywhere)
        if self._context is None and not self._routing:
            return self._plain(kept, everywhere=everywhere)
        batch = self._rows(kept)
        if not self._routing:
            return self._all_after_context(kept, batch, everywhere=everywhere)
        from cggr_core.routing import NO_CONTEXT

        context, values = NO_CONTEXT, None
        with self._passes.step():
            if everywhere or self._engine == "two_pass":
                context, values = self._passes.context(
                    batch,
                    depth=self._passes.depth,
                    keep_graph=self._keep_graph,
                    head=everywhere,
                    precision=self._precision,
                )
            at_kept, auxiliary_loss = self._passes.gradient(
                batch,
                kept.selection,
                context,
                keep_graph=self._keep_graph,
                hidden=self._hidden,
                precision=self._precision,
            )
        return Values(kept, at_kept, values, auxiliary_loss)

    def _rows(self, kept: Kept) -> TokenInputs:
        """The rows that run, after their contexts if they have any."""
        if self._context is None:
            return self.batch if kept.rows is None else _rows_of(self.batch, kept.rows)
        context, arguments = self._context, self._arguments
        if kept.rows is not None:
            context = context.of_rows(kept.row_numbers, kept.shape[0])
            arguments = {name: value.index_select(0, kept.rows) for name, value in arguments.items()}
        return SharedRun(self._passes, context, arguments).after_context(
            gradient_mode=self._gradient_mode, precision=self._precision if self._routing else None
        )

    def _all_after_context(self, kept: Kept, batch: TokenInputs, *, everywhere: bool) -> Values:
        """All tokens of the rows with an ordinary graph, through a gradient pass that keeps every one of them."""
        from cggr_core.routing import NO_CONTEXT

        values, auxiliary_loss = self._passes.gradient(
            batch, all_tokens(batch), NO_CONTEXT, keep_graph=False, hidden=self._hidden
        )
        return _at_kept(kept, values, auxiliary_loss, everywhere=everywhere)

    def _plain(self, kept: Kept, *, everywhere: bool) -> Values:
        arguments = self._arguments
        if kept.rows is not None:
            arguments = {name: _rows(value, kept.rows, kept.shape[0]) for name, value in arguments.items()}
        if everywhere:
            values, auxiliary_loss = self._passes.plain(arguments, hidden=self._hidden)
            return _at_kept(kept, values, auxiliary_loss, everywhere=True)
        at_kept, auxiliary_loss = self._passes.plain(arguments, hidden=self._hidden, positions=kept.selection.index)
        return Values(kept, at_kept, None, auxiliary_loss)


def _at_kept(kept: Kept, values: Tensor, auxiliary_loss: Tensor | None, *, everywhere: bool) -> Values:
    index = kept.selection.index[:, :, None].expand(-1, -1, values.shape[2])
    return Values(kept, values.gather(1, index), values.detach() if everywhere else None, auxiliary_loss)


def _rows(value: Any, rows: Tensor, batch_size: int) -> Any:
    # Position ids [1, S] apply to all rows of a larger batch.
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch_size:
        return value.index_select(0, rows)
    return value


def _rows_of(batch: TokenInputs, rows: Tensor) -> TokenInputs:
    size = batch.shape[0]
    return replace(
        batch,
        per_token={name: tensor.index_select(0, rows) for name, tensor in batch.per_token.items()},
        position_ids=batch.position_ids.index_select(0, rows),
        padding=None if batch.padding is None else batch.padding.index_select(0, rows),
        segment=None if batch.segment is None else batch.segment.index_select(0, rows),
        options={name: _rows(value, rows, size) for name, value in batch.options.items()},
    )
