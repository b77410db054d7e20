"""Token log-probabilities and hidden states with routed gradients, for any loss."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from cggr_core.checks import check_finite_number, check_flag, count_bad_targets, values_are_free
from cggr_core.logprobs.calling import EngineOfModel, call_in_forward, engine_of, language_model
from cggr_core.logprobs.head import TokenHead
from cggr_core.logprobs.kept import Kept, bad_keep_message, count_bad
from cggr_core.logprobs.passes import RoutedPasses, aligned_targets, check_mode
from cggr_core.logprobs.results import RoutedHidden, TokenLogprobs
from cggr_core.logprobs.shared_context import SharedContext
from cggr_core.selection import Selection
from cggr_core.settings import RoutingSettings

__all__ = ["routed_hidden", "routed_logprobs"]


def routed_logprobs(
    model: nn.Module,
    input_ids: Tensor | None = None,
    *,
    keep: Tensor | Selection,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    gradient_mode: str = RoutingSettings.gradient,
    engine: str | None = RoutingSettings.engine,
    context_precision: str | None = RoutingSettings.context_precision,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    everywhere: bool = False,
    context: SharedContext | None = None,
    **inputs: Any,
) -> TokenLogprobs:
    """Log-probabilities of a batch's tokens, with gradients routed to the kept ones, for any loss.

    Tokens that are not kept are forward-only in every layer, and rows that keep nothing do not run. ``keep``,
    ``targets`` and the results are in *target alignment*: position t is about the prediction of the token at t + 1.
    :func:`keep_tokens` converts a mask over the tokens themselves, such as TRL's completion mask.

    For the tokens ``the cat sat`` with the completion ``cat sat``, ``keep`` is ``[True, True, False]``: position 0
    predicts ``cat``, position 1 predicts ``sat``, position 2 nothing. ``logprob[0, 0]`` is ln p(cat | the).

    With dropout, every pass draws its own mask.

    Args:
        model: A Hugging Face language model, a PEFT or :class:`CGGRModel` wrapper of one, or either prepared by
            ``DistributedDataParallel`` or ``fully_shard``: it is called once, around all passes.
        input_ids: int64 ``[B, S]``.
        keep: bool ``[B, S]``, the positions whose log-probabilities take gradients; or a :class:`Selection`, as from
            :func:`keep_random`. A mask costs one host read, which determines the number of slots per row (rounded up)
            and the rows that run; a selection costs none, and runs all rows.
        attention_mask: ``[B, S]``, 1 = token, 0 = padding, on any side.
        position_ids: int64 ``[B, S]``. Without an attention mask, positions that restart are packed documents, and
            nothing is attended to, or predicted, across them.
        gradient_mode: What a kept token's gradient reaches: ``"exact"`` everything, ``"kv"`` kept tokens at every layer
            and all tokens' key/value projections, ``"detached"`` only kept tokens. Under ``torch.no_grad`` every mode
            is one plain forward.
        engine: ``"interleaved"`` or ``"two_pass"``, same numbers; ``None`` takes the cheaper one that is possible.
        context_precision: ``"fp8"`` computes the linear layers of tokens that need no gradient, those of a shared
            ``context`` among them, in FP8, as :class:`CGGRModel` does; ``None`` for the model's own precision.
        targets: int64 ``[B, S]``, the token that each position predicts, -100 for none. By default the next input token
            of the same document, which masked language models and ``inputs_embeds`` do not have.
        temperature: What the logits are divided by.
        entropy: Also compute entropies, with gradients like the log-probabilities.
        everywhere: Also return the log-probabilities (and entropies) of positions that are not kept, as constants; this
            needs a forward of all tokens through the head. Otherwise they are 0.
        context: Prompts before the rows, each of which runs once for all rows that continue it; in ``"kv"`` the rows'
            gradients reach its key/value projections, in ``"exact"`` all of it.
        **inputs: ``inputs_embeds``, ``token_type_ids`` and other inputs of the model.

    Returns:
        :class:`TokenLogprobs`. If nothing is kept, zeros that are connected to the graph.

    Raises:
        TypeError: If the model or the dtype of an argument is wrong.
        ValueError: If shapes or devices do not match, ``keep`` marks padding or positions without a target, this model
            does not support the mode, or log-probabilities are NaN. Errors that depend on values on a device are raised
            one call later.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from cggr_core import keep_tokens
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4)
        >>> model = LlamaForCausalLM(config)
        >>> input_ids = torch.randint(0, 64, (2, 12))
        >>> completion = torch.arange(12).expand(2, -1) >= 8
        >>> policy = routed_logprobs(model, input_ids, keep=keep_tokens(completion))
        >>> advantages = torch.tensor([[1.0], [-0.5]])
        >>> loss = -(advantages * policy.logprob).sum() / policy.keep.sum()
        >>> loss.backward()
    """
    check_mode(gradient_mode, engine, context_precision, everywhere=check_flag("everywhere", everywhere), inputs=inputs)
    check_flag("entropy", entropy)
    if check_finite_number("temperature", temperature) <= 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature!r}")
    inner = language_model(model)
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **inputs}

    def run() -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        found = engine_of(inner)
        _raise_deferred_errors(found)
        passes = RoutedPasses(
            found.engine,
            arguments,
            gradient_mode=gradient_mode,
            engine=engine,
            context_precision=context_precision,
            hidden=False,
            context=context,
        )
        architecture = found.engine.architecture
        tokens = aligned_targets(
            targets, passes.batch, shifted=architecture.shifted, vocab_size=found.engine.vocab_size
        )
        outside = count_bad_targets(tokens, found.engine.vocab_size)
        given = tokens
        if not values_are_free(tokens):
            tokens = tokens.masked_fill((tokens < 0) | (tokens >= found.engine.vocab_size), -100)
        # A target outside the vocabulary is a separate error, not a fault of the mask that keeps it.
        values = passes.run(keep, given, everywhere=everywhere)
        kept, head = values.kept, TokenHead(architecture.head, temperature)
        here = (tokens if kept.rows is None else tokens.index_select(0, kept.rows)).gather(1, kept.selection.index)
        here = here.masked_fill(~kept.selection.valid, -100)
        logprob, spread = head.logprobs(values.at_kept, here, entropy=entropy)
        _post(found, logprob, keep, passes, given, outside)
        others: tuple[Tensor | None, Tensor | None] = (None, None)
        if values.everywhere is not None:
            others = head.constants(values.everywhere, tokens, entropy=entropy)
        selection = kept.whole_selection()
        weight = torch.zeros(kept.shape, device=tokens.device).scatter(1, selection.index, selection.weight)
        logprob = kept.spread(logprob, others[0])
        spread = None if spread is None else kept.spread(spread, others[1])
        return logprob, spread, selection.mask, weight, values.auxiliary_loss

    return TokenLogprobs(*call_in_forward(model, inner, run, _given(arguments)))


def routed_hidden(
    model: nn.Module,
    input_ids: Tensor | None = None,
    *,
    keep: Tensor | Selection,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    gradient_mode: str = RoutingSettings.gradient,
    engine: str | None = RoutingSettings.engine,
    context_precision: str | None = RoutingSettings.context_precision,
    context: SharedContext | None = None,
    **inputs: Any,
) -> RoutedHidden:
    """Final hidden states of the kept tokens with routed gradients, for a custom head.

    For distillation, value and reward heads, and other losses without one target per token. The model's own head does
    not run and gets no gradient: ``DistributedDataParallel`` needs ``find_unused_parameters=True``.

    Args:
        model: As in :func:`routed_logprobs`.
        input_ids: int64 ``[B, S]``.
        keep: bool ``[B, S]``, the positions whose hidden states you need; or a :class:`Selection`.
        attention_mask: As in :func:`routed_logprobs`.
        position_ids: As in :func:`routed_logprobs`.
        gradient_mode: As in :func:`routed_logprobs`.
        engine: As in :func:`routed_logprobs`.
        context_precision: The same.
        context: As in :func:`routed_logprobs`.
        **inputs: As in :func:`routed_logprobs`.

    Returns:
        :class:`RoutedHidden`. If nothing is kept, zeros that are connected to the graph.

    Raises:
        TypeError: If the model or the dtype of an argument is wrong.
        ValueError: If shapes or devices do not match, ``keep`` marks padding, or this model does not support the mode.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4)
        >>> model, value_head = LlamaForCausalLM(config), torch.nn.Linear(32, 1)
        >>> input_ids = torch.randint(0, 64, (2, 12))
        >>> states = routed_hidden(model, input_ids, keep=torch.arange(12).expand(2, -1) >= 8)
        >>> returns = states.selection.gather(torch.randn(2, 12))
        >>> error = (value_head(states.hidden)[..., 0] - returns).square()
        >>> loss = (error * states.selection.valid).sum() / states.selection.valid.sum()
        >>> loss.backward()
    """
    others = [name for name in inputs if name in signature(routed_logprobs).parameters]
    if others:
        raise ValueError(
            f"{', '.join(others)}: routed_hidden gives hidden states, before the model's head; leave it out, or use "
            "routed_logprobs"
        )
    check_mode(gradient_mode, engine, context_precision, everywhere=False, inputs=inputs)
    inner = language_model(model)
    arguments = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **inputs}
    kept: list[Kept] = []

    def run() -> tuple[Tensor, Tensor | None]:
        found = engine_of(inner)
        _raise_deferred_errors(found)
        passes = RoutedPasses(
            found.engine,
            arguments,
            gradient_mode=gradient_mode,
            engine=engine,
            context_precision=context_precision,
            hidden=True,
            context=context,
        )
        values = passes.run(keep, None, everywhere=False)
        kept.append(values.kept)
        hidden = values.at_kept.masked_fill(~values.kept.selection.valid[:, :, None], 0.0)
        _post(found, hidden, keep, passes, None, None)
        return values.kept.in_whole_batch(hidden), values.auxiliary_loss

    hidden, auxiliary_loss = call_in_forward(model, inner, run, _given(arguments))
    return RoutedHidden(hidden, kept[0].whole_selection(), auxiliary_loss)


def _given(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if value is not None}


def _post(
    found: EngineOfModel,
    values: Tensor,
    keep: Tensor | Selection,
    passes: RoutedPasses,
    targets: Tensor | None,
    outside: Tensor | None,
) -> None:
    """Record errors; raised at once on the CPU, elsewhere by the next call."""
    bad = count_bad(keep.mask, passes.batch, targets) if isinstance(keep, Selection) else values.new_zeros(2)
    outside = bad.new_zeros(()) if outside is None else outside
    found.monitor.post(torch.stack([values.detach().isnan().sum(), outside.to(bad.dtype), *bad]).float())
    if values_are_free(values):
        _raise_deferred_errors(found)


def _raise_deferred_errors(found: EngineOfModel) -> None:
    posted = found.monitor.read()
    if posted is None:
        return
    nan, outside, padding, no_target = (int(count) for count in posted)
    if outside:
        raise ValueError(
            f"targets of the last call had {outside} value(s) outside [0, {found.engine.vocab_size}) that are not -100"
        )
    if padding or no_target:
        raise ValueError("in the last call, " + bad_keep_message(padding, no_target))
    if nan:
        raise ValueError(f"NaN at {nan} kept token(s): look for an overflow or a bad learning rate before this step")
