"""TRL's fused forward, ``model(..., labels=labels, fused_lm_head=True)``, with a backward pass only for kept tokens.

TRL's trainers compute every loss from the per-token log-probabilities that this call returns. TRL skips the logits of
labels of -100, but runs all tokens through the layers with gradients; here those tokens are forward-only in every layer
too. The losses, their normalisation and the head remain TRL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from cggr_core.routing import (
    NO_CONTEXT,
    Engine,
    replaced_forwards,
    shards_layers,
    unwrapped,
    without_hooks,
)
from cggr_core.stopwatch import Stopwatch
from cggr_train.trainer.batch import routed_batch
from cggr_train.trainer.trl.gradient_runs import GradientRuns
from cggr_train.trainer.trl.hooks import uncached_autocast
from cggr_train.trainer.trl.router_loss import COEFFICIENTS
from cggr_train.trainer.trl.rows import (
    check_no_images,
    is_in,
    rows_of,
    shared_prompts,
    spread,
    take_rows,
    without_needless_mask,
)

IGNORED = -100
_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Not passed on: the caller's cache is never filled, and router losses are requested separately.
_INERT = frozenset({"use_cache", "output_router_logits", "return_dict"})

# Maps countable tokens [B, S] and, if the plan measures, values of all labelled tokens by name [B, S] to the kept
# tokens [B, S] and factors on their gradients [B, S] (or None).
Choose = Callable[[Tensor, "Mapping[str, Tensor] | None"], "tuple[Tensor, Tensor | None]"]


@dataclass(frozen=True)
class Plan:
    """What one update keeps.

    Attributes:
        choose: The kept tokens; all labelled ones if None.
        rows: bool ``[B]``, the rows that take part in the update; all if None. The others leave the forward too, unless
            ranks must run the same passes.
        measure: Whether values of all labelled tokens are needed, by ``choose`` or by the loss. They cost a forward.
        fill: ``[B, S]`` log-probabilities to report where nothing is computed; 0 if None.
        entropies: ``[B, S]`` entropies to report there; the mean of those that are computed if None.
        shares_prompts: Whether rows may begin with the same prompt, which is then run once for all of them.
    """

    choose: Choose | None = None
    rows: Tensor | None = None
    measure: bool = False
    fill: Tensor | None = None
    entropies: Tensor | None = None
    shares_prompts: bool = False


class RoutedForward:
    """Replaces a model's forward during a training loss; see the module.

    Args:
        model: The model as the trainer holds it, with TRL's fused head, possibly wrapped by PEFT.
        gradient: ``"kv"``, ``"detached"`` or ``"exact"``.
        context_precision: ``"fp8"`` or ``None``.
        context_margin: Let gradients also reach this many tokens before each kept stretch.
        cuda_graph: ``"auto"`` or ``False``.
        scoring: Adds up the time of measuring.
        autocast: The trainer's mixed precision.

    Attributes:
        metrics: ``kept_tokens``, ``countable_tokens`` and ``rows_skipped`` of the last update, 0-dim tensors.
    """

    def __init__(
        self,
        model: nn.Module,
        gradient: str,
        context_precision: str | None,
        context_margin: int,
        cuda_graph: str | bool,
        scoring: Stopwatch,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model = model
        self.metrics: dict[str, Tensor] = {}
        self._engine = Engine(model)
        self.runs = GradientRuns(
            self._engine, gradient, context_precision, context_margin, records=cuda_graph == "auto"
        )
        self._gradient = gradient
        self._precision = context_precision
        self._margin = context_margin
        self._scoring = scoring
        self._autocast = autocast
        self._mean_entropy: Tensor | None = None

    @contextmanager
    def installed(self, plan: Plan) -> Iterator[None]:
        """Route every fused call with gradients; other calls are the model's own."""
        own: Callable[..., Any] = self.model.forward

        def forward(*args: Any, **inputs: Any) -> Any:
            if not (inputs.get("fused_lm_head") and torch.is_grad_enabled()):
                return own(*args, **inputs)
            if args or inputs.get("labels") is None:
                raise ValueError("a routed fused forward takes its inputs by keyword, with labels that are not shifted")
            # The passes call the model inside its own call, whose hooks have run.
            with (
                replaced_forwards({self.model: own}),
                without_hooks(self.model),
                self._autocast(),
                uncached_autocast(),
            ):
                return self._fused(plan, **{name: inputs[name] for name in inputs if name != "fused_lm_head"})

        with replaced_forwards({self.model: forward}):
            yield

    @property
    def _sharded(self) -> bool:
        """Whether passes involve collectives, so that every rank must run the same ones whatever its rows."""
        return shards_layers(self._engine.architecture.layers)

    def _fused(self, plan: Plan, *, labels: Tensor, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        targets = pad(labels[:, 1:], (0, 1), value=IGNORED)
        countable = targets != IGNORED
        rows = None if self._sharded else rows_of(plan.rows, countable, inputs)
        run = self._plain if self._gradient == "exact" else self._routed
        output, keep, weight = run(plan, inputs, targets, rows)
        for name in _PER_TOKEN:
            value = output.get(name)
            if value is None:
                continue
            if weight is not None and value.requires_grad:
                value = value.detach() + weight * (value - value.detach())
            output[name] = (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value)[:, :-1]
        count = countable.sum()
        output.label_mask = countable[:, :-1]
        output.loss = -output.log_probs.sum() / (
            count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        )
        left = torch.zeros_like(countable[:, 0]) if plan.rows is None else ~plan.rows
        self.metrics = {
            "kept_tokens": keep.sum(),
            "countable_tokens": count,
            "rows_skipped": (countable.any(1) & left).sum(),
        }
        return output

    def _plain(
        self, plan: Plan, inputs: dict[str, Any], targets: Tensor, rows: Tensor | None
    ) -> tuple[Any, Tensor, Tensor | None]:
        """TRL's own forward; the selection picks what the head and its backward see."""
        countable = targets != IGNORED
        keep, weight = (countable, None) if plan.measure else _chosen(plan, countable, None)
        output = self._own(inputs, targets.masked_fill(~keep, IGNORED), rows)
        index = torch.arange(targets.shape[1], device=targets.device).expand_as(targets)
        index, valid = (index, keep) if rows is None else (index[rows], keep[rows])
        values = _per_token(output)
        beside = self._beside(plan, inputs, targets, rows)
        for name, value in values.items():
            output[name] = spread(value, index, valid, rows, self._below(name, value, valid, targets, plan, beside))
        if plan.measure:
            measured = {name: output[name].detach() for name in values}
            keep, weight = _chosen(plan, countable, measured)
        return output, keep, weight

    def _routed(
        self, plan: Plan, inputs: dict[str, Any], targets: Tensor, rows: Tensor | None
    ) -> tuple[Any, Tensor, Tensor | None]:
        """Kept tokens through the layers with gradients, after or between passes of the others without."""
        check_no_images(inputs, self._gradient)
        countable, part = targets != IGNORED, targets if rows is None else targets[rows]
        arguments = {name: value for name, value in routed_batch(inputs).items() if name not in _INERT}
        arguments = without_needless_mask(take_rows(arguments, rows, len(targets)))
        keep_graph, engine = self._gradient == "kv", self._engine
        with self._router_losses(wanted=bool(inputs.get("output_router_logits"))):
            # A margin consists of the end of the prompt, so rows with a margin run whole.
            shares = plan.shares_prompts and not (self._sharded or self._margin)
            prompts = shared_prompts(arguments, part != IGNORED) if shares else None
            start = 0 if prompts is None else prompts.input_ids.shape[1]
            batch, context, measured = None, NO_CONTEXT, None
            if plan.measure:
                batch = self.runs.inputs(arguments, prompts)
                with self._scoring.measure(targets.device):
                    context, hidden = engine.context(
                        batch,
                        depth=engine.depth,
                        keep_graph=keep_graph,
                        head=True,
                        hidden=True,
                        precision=self._precision,
                    )
                    assert hidden is not None  # asked for
                    measured = self._measured(plan, inputs, targets, rows, hidden, start)
            keep, weight = _chosen(plan, countable, measured)
            kept = (keep if rows is None else keep[rows])[:, start:]
            selection = self.runs.selected(kept, arguments, recurring=batch is None)
            if batch is None:
                hidden, auxiliary = self.runs.run(arguments, prompts, selection)
            else:
                hidden, auxiliary = engine.gradient(
                    batch, selection, context, keep_graph=keep_graph, hidden=True, precision=self._precision
                )
        index, valid = selection.index + start, selection.valid & kept.gather(1, selection.index)
        output = self._head(hidden, part.gather(1, index).masked_fill(~valid, IGNORED))
        for name, value in _per_token(output).items():
            below = self._below(name, value, valid, targets, plan, measured)
            output[name] = spread(value, index, valid, rows, below)
        output.aux_loss = auxiliary
        return output, keep, weight

    @torch.no_grad()
    def _measured(
        self,
        plan: Plan,
        inputs: dict[str, Any],
        targets: Tensor,
        rows: Tensor | None,
        hidden: Tensor,
        start: int,
    ) -> dict[str, Tensor]:
        """Values of all labelled tokens, ``[B, S]`` each, from the head's input of what was run, from ``start`` on."""
        output = self._head(hidden, (targets if rows is None else targets[rows])[:, start:])
        values = {name: pad(value, (start, 0)) for name, value in _per_token(output).items()}
        if rows is None:
            return values
        beside = self._beside(plan, inputs, targets, rows)
        assert beside is not None  # rows left, and the plan measures
        return {name: beside[name].index_copy(0, rows, value) for name, value in values.items()}

    @torch.no_grad()
    def _beside(
        self, plan: Plan, inputs: dict[str, Any], targets: Tensor, rows: Tensor | None
    ) -> dict[str, Tensor] | None:
        """Values of the rows that left, ``[B, S]`` each, if the plan measures."""
        if rows is None or not plan.measure:
            return None
        others = (~is_in(rows, len(targets), targets.device)).nonzero()[:, 0]
        values = _per_token(self._own(inputs, targets, others))
        return {name: value.new_zeros(targets.shape).index_copy(0, others, value) for name, value in values.items()}

    def _own(self, inputs: dict[str, Any], targets: Tensor, rows: Tensor | None) -> Any:
        """TRL's fused forward of some rows."""
        labels = pad(targets[:, :-1], (1, 0), value=IGNORED)
        output = self.model(**take_rows({**inputs, "labels": labels}, rows, len(targets)), fused_lm_head=True)
        for name, value in _per_token(output).items():
            # Virtual tokens of prompt learning come first; the last position predicts nothing.
            output[name] = pad(value[:, 1 - targets.shape[1] :], (0, 1))
        return output

    def _head(self, hidden: Tensor, targets: Tensor) -> Any:
        """TRL's fused head on hidden states ``[b, K, H]`` with their targets ``[b, K]``."""
        base = unwrapped(self.model)
        # The fused forward reads the backbone's last hidden state; shifted labels are scored unchanged.
        backbone = {base.base_model: lambda *_, **__: SimpleNamespace(last_hidden_state=hidden)}
        with replaced_forwards(backbone), without_hooks(base.base_model):
            return base.forward(fused_lm_head=True, shift_labels=targets, output_router_logits=False)

    def _below(
        self,
        name: str,
        like: Tensor,
        valid: Tensor,
        targets: Tensor,
        plan: Plan,
        measured: Mapping[str, Tensor] | None,
    ) -> Tensor:
        """Values reported where nothing is computed, ``[B, S]``: 0 without a label, as in TRL."""
        if measured is not None:
            return measured[name]
        if name == "log_probs" and plan.fill is not None:
            return plan.fill.to(like.dtype)
        below = like.new_zeros(targets.shape)
        if name != "entropy":
            return below
        # With the mean of the computed ones, the trainer's mean over all labelled tokens is that mean.
        known = self._mean_of(like.detach(), valid) if plan.entropies is None else plan.entropies.to(like.dtype)
        return torch.where(targets == IGNORED, below, known)

    def _mean_of(self, entropies: Tensor, valid: Tensor) -> Tensor:
        """The mean of the computed entropies; if an update computes none, that of the last one that did."""
        count = valid.sum()
        before = entropies.new_tensor(float("nan")) if self._mean_entropy is None else self._mean_entropy
        mean = torch.where(count > 0, entropies.masked_fill(~valid, 0.0).sum() / count.clamp(min=1), before)
        self._mean_entropy = mean
        return mean

    @contextmanager
    def _router_losses(self, *, wanted: bool) -> Iterator[None]:
        """Let the gradient pass report the expert routers' balancing loss, without a coefficient: TRL has its own."""
        if not wanted:
            yield
            return
        base = unwrapped(self.model)
        config = base.config.get_text_config()
        # Models that store the coefficient at construction read their own; the others read their config's.
        changes: list[tuple[Any, str, Any]] = [(config, "output_router_logits", True)]
        changes += [
            (owner, name, 1.0)
            for owner in (base, config)
            for name in COEFFICIENTS
            if getattr(owner, name, None) is not None
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
        try:
            for owner, name, value in changes:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)


def _chosen(plan: Plan, countable: Tensor, measured: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor | None]:
    keep, weight = (countable, None) if plan.choose is None else plan.choose(countable, measured)
    return (keep if plan.rows is None else keep & plan.rows[:, None]), weight


def _per_token(output: Any) -> dict[str, Tensor]:
    """The fields that the trainer requests from TRL's head."""
    return {name: value for name in _PER_TOKEN if (value := output.get(name)) is not None}
