"""GKD on part of the tokens, with logits computed one chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from cggr_core.routing import replaced_forwards, unwrapped
from cggr_train.trainer.trl.distillation import DivergenceLoss
from cggr_train.trainer.trl.hooks import check_methods, overridden, uncached_autocast
from cggr_train.trainer.trl.states import kept_states

if TYPE_CHECKING:
    from cggr_core.stopwatch import Stopwatch
    from cggr_train.trainer.config import CGGRConfig

_CHUNK = 512  # tokens whose logits exist at once, for the student and the teacher each


class GKDLoss(DivergenceLoss):
    """TRL's GKDTrainer.

    Its loss takes the logits ``[B, S, V]`` of two models. Here both models return the hidden states of the kept tokens
    instead, and the loss is summed over chunks of them.
    """

    def __init__(self, trainer: Any, config: CGGRConfig, scoring: Stopwatch) -> None:
        super().__init__(trainer, config, scoring)
        check_methods(
            trainer,
            {"generalized_jsd_loss": ("student_logits", "teacher_logits", "labels", "beta", "num_items_in_batch")},
        )

    def temperature(self) -> float:
        """GKD's temperature applies to generation; the loss has none."""
        return 1.0

    def loss(self, own: Callable[..., Any], model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """The trainer's own loss, with a backward pass through the kept tokens only."""
        trainer = self.trainer
        student = trainer.accelerator.unwrap_model(trainer.model)
        teacher = trainer.accelerator.unwrap_model(trainer.teacher_model)
        countable = pad(inputs["labels"][:, 1:] != -100, (0, 1))
        own_student, own_teacher = student.forward, teacher.forward
        teacher_states: list[Tensor] = []
        kept: list[Tensor] = []

        def of_teacher(**given: Any) -> Tensor:
            if not teacher_states:
                trainer.teacher_model.eval()
                with torch.no_grad(), replaced_forwards({teacher: own_teacher}):
                    teacher_states.append(unwrapped(teacher).base_model(**given, use_cache=False).last_hidden_state)
            return teacher_states[0]

        def as_student(**given: Any) -> Any:
            def choose(hidden: Tensor | None) -> Tensor:
                seen = of_teacher(**given) if self.needs_teacher else None
                kept.append(self.chosen(student, hidden, countable, teacher, seen)[0])
                return kept[0]

            with replaced_forwards({student: own_student}), trainer.accelerator.autocast():
                states = kept_states(
                    self.engine(student),
                    given,
                    gradient=self.config.gradient,
                    context_precision=self.config.context_precision,
                    choose=choose,
                    scored=self.scored,
                    scoring=self.scoring,
                )
            return CausalLMOutput(logits=_packed(states.hidden, states.selection.valid))

        def as_teacher(**given: Any) -> Any:
            return CausalLMOutput(logits=_packed(of_teacher(**given), kept[0]))

        divergence = partial(
            _chunked, trainer.generalized_jsd_loss, self.head(student), self.head(teacher), kept, self.share
        )
        with (
            uncached_autocast(),
            replaced_forwards({student: as_student, teacher: as_teacher}),
            overridden(trainer, generalized_jsd_loss=divergence),
        ):
            return own(model, inputs, **options)


def _packed(values: Tensor, valid: Tensor) -> Tensor:
    """The valid slots of ``[B, K, H]``, concatenated to ``[1, N + 1, H]``: GKD drops the last position."""
    return pad(values[valid], (0, 0, 0, 1))[None]


def _chunked(
    own: Callable[..., Tensor],
    student_head: Callable[[Tensor], Tensor],
    teacher_head: Callable[[Tensor], Tensor],
    kept: list[Tensor],
    share: Callable[[], Tensor],
    *,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    num_items_in_batch: Any = None,
    **options: Any,
) -> Tensor:
    """The loss of hidden states in place of logits, ``[1, N, H]`` each, divided by the kept tokens."""

    def of_chunk(student: Tensor, teacher: Tensor) -> Tensor:
        return own(
            student_logits=student_head(student)[None],
            teacher_logits=teacher_head(teacher)[None],
            num_items_in_batch=1,
            **options,
        )

    del labels  # TRL's denominator counts all tokens; this one counts the kept ones
    students, teachers = student_logits[0].split(_CHUNK), teacher_logits[0].split(_CHUNK)
    total = student_logits.sum() * 0.0  # keeps the graph connected where nothing is kept
    for student, teacher in zip(students, teachers, strict=True):
        total = total + checkpoint(of_chunk, student, teacher, use_reentrant=False)
    count = kept[0].sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch * share()
    return total / count
