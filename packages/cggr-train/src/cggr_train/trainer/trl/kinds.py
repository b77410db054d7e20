"""The supported TRL trainers and the kind of loss that each of them has."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from cggr_train.trainer.trl.known_settings import unknown_settings_message

if TYPE_CHECKING:
    from cggr_core.stopwatch import Stopwatch
    from cggr_train.trainer.config import CGGRConfig
    from cggr_train.trainer.trl.task import TaskLoss

_log = logging.getLogger(__name__)

# The supported classes, by module and name in TRL.
KNOWN = {
    ("trl.trainer.sft_trainer", "SFTTrainer"): "sft",
    ("trl.trainer.dpo_trainer", "DPOTrainer"): "preference",
    ("trl.trainer.kto_trainer", "KTOTrainer"): "preference",
    ("trl.trainer.grpo_trainer", "GRPOTrainer"): "policy",
    ("trl.trainer.rloo_trainer", "RLOOTrainer"): "policy",
    ("trl.trainer.distillation_trainer", "DistillationTrainer"): "distillation",
    ("trl.experimental.gkd.gkd_trainer", "GKDTrainer"): "gkd",
}


def kind_of(trainer_class: type) -> str | None:
    """The kind of the trainer's loss, a value of :data:`KNOWN`; None for the cross-entropy of a plain Trainer."""
    for base in trainer_class.__mro__:
        found = KNOWN.get((base.__module__, base.__name__))
        if found is not None:
            return found
    return None


def trains_by_task(trainer_class: type) -> bool:
    """Whether the trainer has its own loss, which determines its own tokens."""
    return kind_of(trainer_class) not in (None, "sft")


def task_loss(trainer: Any, config: CGGRConfig, scoring: Stopwatch) -> TaskLoss | None:
    """Build the object that routes a trainer's own loss.

    Args:
        trainer: The trainer, after ``__init__``.
        config: The settings of CGGR.
        scoring: Adds up the time of scoring.

    Returns:
        None where the loss is the cross-entropy of tokens picked by a score.

    Raises:
        ValueError: If a setting does not suit the trainer's loss.
        RuntimeError: If this version of TRL lacks a method that is overridden.
    """
    kind = kind_of(type(trainer))
    message = None if kind is None else unknown_settings_message(trainer.args)
    if message is not None:
        _log.warning(message)
    if kind is None or (kind == "sft" and config.selection != "supervised"):
        return None
    if kind == "policy":
        from cggr_train.trainer.trl.policy import PolicyLoss

        return PolicyLoss(trainer, config, scoring)
    if kind == "distillation":
        from cggr_train.trainer.trl.distillation import DistillationLoss

        return DistillationLoss(trainer, config, scoring)
    if kind == "gkd":
        from cggr_train.trainer.trl.gkd import GKDLoss

        return GKDLoss(trainer, config, scoring)
    from cggr_train.trainer.trl.task import LabelledLoss

    return LabelledLoss(trainer, config, scoring)
