"""GRPO and RLOO: updates on the tokens with an advantage or, optionally, on those of them with high entropy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import pad

from cggr_train.trainer.trl.fused_forward import Plan
from cggr_train.trainer.trl.hooks import check_methods, overridden
from cggr_train.trainer.trl.task import LabelledLoss

if TYPE_CHECKING:
    from cggr_core.stopwatch import Stopwatch
    from cggr_train.trainer.config import CGGRConfig

_log = logging.getLogger(__name__)
ENTROPIES = "cggr_entropies"
# Values of ``loss_type`` in which the loss of a token depends on no other token but through the importance ratio.
_BY_TOKEN = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo")


class PolicyLoss(LabelledLoss):
    """A clipped policy gradient on completions.

    Tokens that the loss leaves out (prompts, observations of tools, those below ``top_entropy_quantile``) and rows
    without an advantage are skipped. Entropies come from the pass that computes the old log-probabilities if TRL runs
    one, otherwise from a pass without gradients whose results the update reuses.
    """

    has_advantages = True

    def __init__(self, trainer: Any, config: CGGRConfig, scoring: Stopwatch) -> None:
        super().__init__(trainer, config, scoring)
        check_methods(
            trainer,
            {
                "_compute_loss": ("model", "inputs"),
                "_get_per_token_logps_and_entropies": ("model", "compute_entropy"),
                "_generate_and_score_completions": ("inputs",),
            },
        )
        self._quantile = float(getattr(trainer, "top_entropy_quantile", 1.0))
        # A loss of which nothing is known counts as one that takes whole completions, as RLOO's does.
        self._sequence_ratio = (
            getattr(trainer, "importance_sampling_level", "sequence") != "token"
            or getattr(trainer, "off_policy_mask_threshold", None) is not None
            or getattr(trainer, "loss_type", None) not in _BY_TOKEN
        )
        self._kl = bool(trainer.beta) and hasattr(trainer, "get_high_entropy_mask")  # RLOO adds KL to the reward
        self._skips_rows = self._may_skip_rows()
        # The KL term covers every token of the completion, so all of them stay.
        self._narrows = self._quantile < 1 and not self._kl
        if self._quantile < 1 and self.selection == "random":
            raise ValueError(
                f"top_entropy_quantile={self._quantile} and selection='random' both select tokens; use only one of them"
            )
        if self._quantile < 1:
            check_methods(trainer, {"get_high_entropy_mask": ("entropies", "mask", "threshold")})
            if not self._narrows:
                _log.warning(
                    "top_entropy_quantile=%s masks only the policy term: beta=%s adds a KL term at every completion "
                    "token, so all of them stay in the update",
                    self._quantile,
                    trainer.beta,
                )
        own = trainer._generate_and_score_completions
        vars(trainer)["_generate_and_score_completions"] = partial(self._generated, own)

    def loss(self, own: Callable[..., Any], model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """The trainer's own loss, with a backward pass through the kept tokens only."""
        if not self._narrows:
            return super().loss(own, model, inputs, **options)
        found: list[Tensor] = []
        plan = self._plan(inputs, found)
        # TRL calls this again with the entropies from the update's forward.
        with self.forward().installed(plan), overridden(self.trainer, get_high_entropy_mask=lambda *_, **__: found[0]):
            return own(model, inputs, **options)

    def plan(self, inputs: dict[str, Any]) -> Plan:
        """What this update keeps."""
        return self._plan(inputs, [])

    def _plan(self, inputs: dict[str, Any], found: list[Tensor]) -> Plan:
        completion = inputs["completion_mask"]
        mask = completion * inputs["tool_mask"] if "tool_mask" in inputs else completion
        before = inputs["prompt_ids"].shape[1] - 1  # the position before a token predicts it
        entropies = inputs.get(ENTROPIES)

        def choose(countable: Tensor, measured: Mapping[str, Tensor] | None) -> tuple[Tensor, Tensor | None]:
            inside = countable & pad(mask.bool(), (before, 1))
            if self.selection == "random":
                return self._random(inside, measured)
            if not self._narrows:
                return inside, None
            known = entropies
            if known is None:
                assert measured is not None  # present, since the plan measures
                known = measured["entropy"][:, before:-1]
            found.append(type(self.trainer).get_high_entropy_mask(self.trainer, known, mask, 1 - self._quantile))
            return inside & pad(found[0], (before, 1)), None

        picked = self._narrows or self.selection == "random"
        needs_values = picked and (self._sequence_ratio or self._kl)
        return Plan(
            choose=choose,
            rows=self._rows(inputs["advantages"]),
            measure=needs_values or (self._narrows and entropies is None),
            fill=_old_log_probs(inputs, before),
            entropies=None if entropies is None else pad(entropies, (before, 1)),
            shares_prompts=self.shares_prompts,
        )

    def _rows(self, advantages: Tensor) -> Tensor | None:
        if not self._skips_rows:
            return None
        return advantages.reshape(len(advantages), -1).ne(0).any(1)

    def _may_skip_rows(self) -> bool:
        trainer, asked = self.trainer, self.config.skip_zero_advantage
        if asked is False:
            return False
        reasons = []
        if self._kl:
            reasons.append(f"beta={trainer.beta} adds a KL term to them")
        if getattr(trainer, "_entropy_bonus_enabled", False):
            reasons.append("the entropy bonus (entropy_coef or use_adaptive_entropy) acts on them")
        if getattr(trainer, "aux_loss_enabled", False):
            reasons.append("the expert routers' auxiliary loss (router_aux_loss_coef) acts on them")
        if reasons and asked:
            raise ValueError(
                f"skip_zero_advantage=True would change the gradient: {' and '.join(reasons)}; turn that off, or "
                "leave skip_zero_advantage unset, which keeps such rows when they matter"
            )
        if reasons:
            _log.warning("rows whose advantage is zero stay in the update: %s", " and ".join(reasons))
        return not reasons

    def _generated(self, own: Callable[..., Any], inputs: Any) -> dict[str, Any]:
        """A generation batch, with the entropies from the pass that computed its old log-probabilities."""
        trainer = self.trainer
        passes: list[tuple[Tensor, Tensor]] = []
        log_probs_of = trainer._get_per_token_logps_and_entropies

        def noted(model: Any, *args: Any, **options: Any) -> Any:
            policy = model is trainer.model
            found = log_probs_of(model, *args, **{**options, **({"compute_entropy": True} if policy else {})})
            if policy:
                passes.append((found[0], found[1]))
            return found

        with overridden(trainer, _get_per_token_logps_and_entropies=noted):
            output = own(inputs)
        old = output.get("old_per_token_logps")
        for log_probs, entropies in passes:
            # RLOO stores the sum of the old log-probabilities, which it computes first.
            if log_probs is old or (log_probs is passes[0][0] and "old_logps" in output):
                output[ENTROPIES] = entropies
        return output


def _old_log_probs(inputs: dict[str, Any], before: int) -> Tensor | None:
    """``[B, S]``: they give a skipped token a ratio of 1, so that it is never clipped and cannot overflow."""
    old = inputs.get("old_per_token_logps")
    if old is None and "old_logps" in inputs:  # RLOO stores their sum
        completion = inputs["completion_mask"]
        old = completion * (inputs["old_logps"] / completion.sum(1).clamp(min=1))[:, None]
    return None if old is None else pad(old, (before, 1))
