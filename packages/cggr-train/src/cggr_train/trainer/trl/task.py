"""A trainer's own loss on the tokens that it covers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_core import keep_random
from cggr_core.routing import unwrapped
from cggr_core.settings import RoutingSettings, check_context_precision
from cggr_train.trainer.config import given
from cggr_train.trainer.trl.fused_forward import Plan, RoutedForward
from cggr_train.trainer.trl.hooks import check_fused_head

if TYPE_CHECKING:
    from cggr_core.stopwatch import Stopwatch
    from cggr_train.trainer.config import CGGRConfig

# Settings that only matter where tokens are picked by a score, each with its neutral value.
_OF_SCORES = {
    "router": "full_depth",
    "router_depth": None,
    "ratio_warmup_steps": RoutingSettings.warmup_steps,
    "dynamic_threshold": RoutingSettings.dynamic_threshold,
    "threshold_sensitivity": RoutingSettings.threshold_sensitivity,
    "block_size": RoutingSettings.block_size,
    "unbiased": RoutingSettings.unbiased,
}


class TaskLoss:
    """Routes a trainer's own loss; created once, after the trainer.

    Args:
        trainer: The trainer, after ``__init__``.
        config: The settings of CGGR.
        scoring: Accumulates the time spent on scoring.

    Raises:
        ValueError: If a setting does not suit this loss.
        RuntimeError: If this version of TRL lacks a method that is overridden.
    """

    selections: tuple[str, ...] = ("supervised", "random")
    scorings: tuple[str, ...] = ()
    default_ratio = RoutingSettings.min_tokens_ratio
    has_advantages = False
    """Whether rows have advantages, and leave the update without one."""
    pairs = False
    """Whether a batch is the chosen rows of pairs, followed by the rejected ones."""
    has_margin = False
    """Whether tokens before the kept ones can be kept without a loss."""

    def __init__(self, trainer: Any, config: CGGRConfig, scoring: Stopwatch) -> None:
        self.trainer = trainer
        self.config = config
        self.scoring = scoring
        self.selection: str = given(config.selection, self.selections[0])
        self.ratio: float = given(config.min_tokens_ratio, self.default_ratio)
        self._check_settings()

    @property
    def metrics(self) -> dict[str, Tensor]:
        """``kept_tokens``, ``countable_tokens`` and ``rows_skipped`` of the last update."""
        raise NotImplementedError

    def loss(self, own: Callable[..., Any], model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """The trainer's own loss, its backward spent on the kept tokens.

        Args:
            own: The trainer's ``compute_loss``.
            model: The model, as the trainer has wrapped it.
            inputs: A batch.
            **options: Of ``compute_loss``.
        """
        raise NotImplementedError

    def _check_settings(self) -> None:
        config, name = self.config, self._name()
        if config.gradient == "sequence":
            raise ValueError(
                f"gradient='sequence' keeps whole sequences by their scores, but {name} decides which rows count; "
                "use 'kv', 'detached' or 'exact'"
            )
        check_context_precision(config.context_precision, "gradient", config.gradient)
        if config.context_margin:
            idle = None if self.has_margin else f"{name} does not read it"
            if config.gradient == "exact":
                idle = "gradient='exact' already reaches all tokens"
            elif self.selection != "supervised":
                idle = f"it needs selection='supervised', but selection is {self.selection!r}"
            if idle is not None:
                raise ValueError(f"context_margin={config.context_margin} would have no effect: {idle}; leave it at 0")
        if self.selection not in self.selections:
            known = " or ".join(map(repr, self.selections))
            raise ValueError(
                f"selection={self.selection!r} selects tokens by a cross-entropy score, but {name} has its own loss; "
                f"use {known}"
            )
        if config.scoring is not None and config.scoring not in self.scorings:
            known = f"use {' or '.join(map(repr, self.scorings))}" if self.scorings else "leave it out"
            raise ValueError(f"scoring={config.scoring!r} does not apply to the loss of {name}; {known}")
        for setting, idle in _OF_SCORES.items():
            if getattr(config, setting) != idle:
                raise ValueError(
                    f"{setting}={getattr(config, setting)!r} applies to tokens selected by a score, but {name} selects "
                    f"its own; leave it at {idle!r}"
                )
        if config.engine is not None:
            raise ValueError(
                f"engine={config.engine!r} has no effect: with {name}, an update takes two passes if its loss needs "
                "values of skipped tokens, and otherwise one; leave it unset"
            )
        if config.cuda_graph not in ("auto", False, None):
            raise ValueError(f"cuda_graph must be 'auto' or False, got {config.cuda_graph!r}")
        if config.skip_zero_advantage is not None and not self.has_advantages:
            raise ValueError(
                f"skip_zero_advantage={config.skip_zero_advantage} has no effect: rows have no advantages in the loss "
                f"of {name}; leave it unset"
            )
        if not 0 < self.ratio <= 1:
            raise ValueError(f"min_tokens_ratio must be in (0, 1], got {self.ratio}")
        if self.selection == "supervised" and config.min_tokens_ratio is not None:
            others = " or ".join(repr(kind) for kind in self.selections if kind != "supervised")
            raise ValueError(
                f"min_tokens_ratio={config.min_tokens_ratio} with selection='supervised', which keeps every token in "
                f"the loss of {name}; for a share of them use selection={others}, else leave min_tokens_ratio unset"
            )

    def _name(self) -> str:
        return next(base.__name__ for base in type(self.trainer).__mro__ if base.__module__.split(".")[0] == "trl")

    def draw(self) -> dict[str, int]:
        """Counters of the next random draw, independent of how the step is split."""
        trainer, seed = self.trainer, self.config.selection_seed
        return {
            "seed": trainer.args.seed if seed is None else seed,
            "draw": trainer.state.global_step,
            "first_row": trainer.first_row(),
        }

    def _random(self, countable: Tensor, measured: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        """Sample labelled tokens uniformly, with 1 / inclusion probability as a factor on their gradients."""
        draw, order = self.draw(), None
        if self.pairs:  # the chosen ones come before the rejected ones; numbered by pairs, a step can be split
            order = torch.arange(len(countable), device=countable.device).view(2, -1).T.flatten()
            countable, draw["first_row"] = countable[order], 2 * draw["first_row"]
        selection = keep_random(countable, self.ratio, **draw)
        width = countable.shape[1]
        weight = torch.zeros((len(countable), width + 1), device=countable.device)
        weight = weight.scatter(1, selection.index.masked_fill(~selection.valid, width), selection.weight)[:, :width]
        mask = selection.mask
        return (mask, weight) if order is None else (mask[order.argsort()], weight[order.argsort()])


class LabelledLoss(TaskLoss):
    """SFT on supervised tokens, DPO and KTO: labelled tokens keep their gradient, prompts are forward-only.

    If only a random share of the labelled tokens is kept, the values of all of them are computed too, since preference
    losses sum over whole completions.
    """

    has_margin = True

    def __init__(self, trainer: Any, config: CGGRConfig, scoring: Stopwatch) -> None:
        super().__init__(trainer, config, scoring)
        check_fused_head(trainer, unwrapped(trainer.model))
        # The completions of a pair, or of a group, share their prompt.
        self.pairs = hasattr(trainer, "loss_weights")
        self.shares_prompts = self.pairs or hasattr(trainer, "num_generations")
        self._forward: RoutedForward | None = None
        self._forward_for: Any = None

    @property
    def metrics(self) -> dict[str, Tensor]:
        """``kept_tokens``, ``countable_tokens`` and ``rows_skipped`` of the last update."""
        return {} if self._forward is None else self._forward.metrics

    def loss(self, own: Callable[..., Any], model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """The trainer's own loss, its backward spent on the kept tokens."""
        with self.forward().installed(self.plan(inputs)):
            return own(model, inputs, **options)

    def plan(self, inputs: dict[str, Any]) -> Plan:
        """What this update keeps."""
        if self.selection == "random":
            return Plan(choose=self._random, measure=True, shares_prompts=self.shares_prompts)
        return Plan(shares_prompts=self.shares_prompts)

    def forward(self) -> RoutedForward:
        """The replacement for the forward of the trainer's current model."""
        if self._forward is not None and self._forward_for is self.trainer.model:
            return self._forward
        self._forward_for = self.trainer.model
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)  # milliseconds
        if self._forward is None or self._forward.model is not model:
            autocast = self.trainer.accelerator.autocast
            self._forward = RoutedForward(
                model,
                self.config.gradient,
                self.config.context_precision,
                self.config.context_margin,
                self.config.cuda_graph or False,
                self.scoring,
                autocast,
            )
        return self._forward
