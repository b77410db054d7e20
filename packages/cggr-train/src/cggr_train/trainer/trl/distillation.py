"""Distillation on part of the tokens, chosen by the student's entropy or its divergence from the teacher."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cggr_core import keep_random, keep_top_entropy
from cggr_core.routing import Engine
from cggr_train.trainer.trl.hooks import check_methods, overridden, uncached_autocast
from cggr_train.trainer.trl.rows import check_no_images
from cggr_train.trainer.trl.states import LogitsHead, kept_states, token_scores
from cggr_train.trainer.trl.task import TaskLoss

if TYPE_CHECKING:
    from cggr_core.stopwatch import Stopwatch
    from cggr_train.trainer.config import CGGRConfig

# Arguments that TRL passes to its forwards besides tokens and masks.
_BESIDE = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids",
    "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


class DivergenceLoss(TaskLoss):
    """Shared by the trainers with a teacher: chooses the kept tokens and averages over them.

    The loss is the mean over the kept tokens: the trainer's denominator is multiplied by the kept share.
    """

    selections = ("topk", "random", "supervised")
    scorings = ("entropy", "divergence")
    default_ratio = 0.5

    def __init__(self, trainer: Any, config: CGGRConfig, scoring: Stopwatch) -> None:
        super().__init__(trainer, config, scoring)
        self.scores = config.scoring or "entropy"
        self._metrics: dict[str, Tensor] = {}
        self._engines: dict[int, Engine] = {}

    @property
    def metrics(self) -> dict[str, Tensor]:
        """``kept_tokens``, ``countable_tokens`` and ``rows_skipped`` of the last update."""
        return self._metrics

    @property
    def scored(self) -> bool:
        """Whether the choice depends on the student's outputs."""
        return self.selection == "topk"

    @property
    def needs_teacher(self) -> bool:
        """Whether the choice depends on the teacher's outputs."""
        return self.scored and self.scores == "divergence"

    def engine(self, model: Any) -> Engine:
        """The engine of the student or the teacher."""
        if id(model) not in self._engines:
            self._engines[id(model)] = Engine(model)  # the engine holds the model, so its id is not reused
        return self._engines[id(model)]

    def head(self, model: Any) -> LogitsHead:
        """The head of the student or the teacher."""
        return LogitsHead(self.engine(model).architecture.head)

    def chosen(
        self, student: Any, hidden: Tensor | None, countable: Tensor, teacher: Any, teacher_hidden: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The kept tokens, and the entropies of all tokens if they were computed.

        Args:
            student: The student.
            hidden: Its states ``[B, S, H]``, without gradients; None where nothing is scored.
            countable: bool ``[B, S]``.
            teacher: The teacher.
            teacher_hidden: Its states ``[B, S, H']``; None where they are not needed.

        Returns:
            bool ``[B, S]``, and float32 ``[N]`` or None.
        """
        entropies = None
        if self.selection == "supervised":
            keep = countable
        elif self.selection == "random":
            keep = keep_random(countable, self.ratio, **self.draw()).mask
        else:
            assert hidden is not None
            entropies, divergences = token_scores(
                self.head(student),
                hidden[countable],
                None if teacher_hidden is None else self.head(teacher),
                None if teacher_hidden is None else teacher_hidden[countable],
                beta=self.trainer.beta,
                temperature=self.temperature(),
            )
            values = entropies if divergences is None else divergences
            score = torch.zeros(countable.shape, device=countable.device).masked_scatter(countable, values)
            keep = keep_top_entropy(score, countable, self.ratio)
        count = countable.sum()
        self._metrics = {
            "kept_tokens": keep.sum(),
            "countable_tokens": count,
            "rows_skipped": torch.zeros_like(count),
        }
        return keep, entropies

    def share(self) -> Tensor:
        """Kept tokens / countable tokens of the last choice."""
        return self._metrics["kept_tokens"] / self._metrics["countable_tokens"].clamp(min=1)

    def temperature(self) -> float:
        """The temperature that the loss divides logits by."""
        return self.trainer.temperature


class DistillationLoss(DivergenceLoss):
    """TRL's DistillationTrainer: its chunked divergence, on the kept tokens of the completions."""

    def __init__(self, trainer: Any, config: CGGRConfig, scoring: Stopwatch) -> None:
        super().__init__(trainer, config, scoring)
        check_methods(
            trainer,
            {
                "_compute_loss": ("unwrapped_student", "inputs", "num_items_in_batch"),
                "_get_last_hidden_state": ("unwrapped_model", "input_ids", "attention_mask", "logits_to_keep"),
                "_forward_redirection": (),
            },
        )

    def loss(self, own: Callable[..., Any], model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """The trainer's own loss, with a backward pass through the kept tokens only."""
        with (
            uncached_autocast(),
            overridden(self.trainer, _compute_loss=partial(self._compute, self.trainer._compute_loss)),
        ):
            return own(model, inputs, **options)

    def _compute(self, own: Callable[..., Any], student: Any, inputs: dict[str, Any], num_items: Any) -> Any:
        # Runs inside the student's own call, so its wrappers (DDP, FSDP) take part.
        if self.config.gradient != "exact":
            check_no_images(inputs, self.config.gradient)
        trainer = self.trainer
        before, length = inputs["prompt_ids"].shape[1] - 1, inputs["completion_ids"].shape[1]
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        countable = pad(mask.bool(), (before, 1))
        given = {
            "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
        }
        extra = {name: inputs[name] for name in _BESIDE if name in inputs}
        states_of = trainer._get_last_hidden_state
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        teacher_states: list[Tensor] = []
        if self.needs_teacher:
            trainer.teacher_model.eval()
            with torch.no_grad(), self.scoring.measure(mask.device):
                teacher_states.append(
                    trainer._forward_redirection(
                        trainer.teacher_model, teacher, states_of, teacher, *given.values(), length, **extra
                    )
                )
        entropies: list[Tensor | None] = []
        everywhere = pad(teacher_states[0], (0, 0, before, 1)) if teacher_states else None

        def choose(hidden: Tensor | None) -> Tensor:
            keep, found = self.chosen(student, hidden, countable, teacher, everywhere)
            entropies.append(found)
            return keep

        states = kept_states(
            self.engine(student),
            {**given, **extra},
            gradient=self.config.gradient,
            context_precision=self.config.context_precision,
            choose=choose,
            scored=self.scored,
            scoring=self.scoring,
        )
        placed = _placed(states.hidden, states.selection.index, states.selection.valid, countable.shape[1])

        def known(model: Any, *args: Any, **options: Any) -> Tensor:
            if model is student:
                return placed[:, before:-1]
            return teacher_states[0] if teacher_states else states_of(model, *args, **options)

        keep = states.selection.mask[:, before:-1]
        items = None if num_items is None else num_items * self.share()
        with overridden(trainer, _get_last_hidden_state=known):
            loss, entropy, count = own(student, {**inputs, "tool_mask": keep.to(mask.dtype)}, items)
        if entropies[0] is not None:  # the trainer logs the mean over all tokens
            entropy, count = entropies[0].sum(), countable.sum()
        return loss, entropy, count


def _placed(hidden: Tensor, index: Tensor, valid: Tensor, length: int) -> Tensor:
    """``[B, K, H]`` at their positions of ``[B, S, H]``, 0 elsewhere."""
    index = index.masked_fill(~valid, length)[:, :, None].expand(-1, -1, hidden.shape[2])
    return hidden.new_zeros(hidden.shape[0], length + 1, hidden.shape[2]).scatter(1, index, hidden)[:, :length]
