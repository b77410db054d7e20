"""Advances the routing schedule with the optimizer and saves its state in the Trainer's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from cggr_train.state_file import load_state, save_state

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from cggr_core import CGGRModel

STATE_NAME = "cggr_state"


class RoutedTrainer(Protocol):
    """The part of a Trainer that the callback uses."""

    resumed_from: Path | None

    def routed_model(self) -> CGGRModel:
        """The model whose schedule is advanced and saved."""
        ...

    def forget_steps(self) -> None:
        """Reset the counters."""
        ...

    def step_routing(self) -> None:
        """Advance the keep ratio by one optimizer step."""
        ...


class CGGRCallback(TrainerCallback):
    """Advances the schedule of the keep ratio and saves it; added by :class:`~cggr_train.trainer.CGGRMixin`.

    A checkpoint gets ``cggr_state.json`` and ``cggr_state.safetensors``, so that a resumed run makes the same
    selections as an uninterrupted one. Without them (a checkpoint of a plain Trainer) the schedule starts at the
    checkpoint's step.
    """

    def __init__(self, trainer: RoutedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the schedule, or continue it from the checkpoint."""
        routed = self._trainer.routed_model()
        self._trainer.forget_steps()
        checkpoint = self._trainer.resumed_from
        if state.global_step and checkpoint is not None and (checkpoint / f"{STATE_NAME}.json").exists():
            routed.load_routing_state_dict(load_state(checkpoint, STATE_NAME))
        else:
            routed.load_routing_state_dict({**routed.routing_state_dict(), "steps": state.global_step})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the keep ratio by one optimizer step."""
        self._trainer.step_routing()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the state to the checkpoint that was just saved."""
        routing = self._trainer.routed_model().routing_state_dict()
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # Trials of a hyperparameter search are saved elsewhere and never resumed.
        if state.is_world_process_zero and not state.is_hyper_param_search:
            save_state(folder, STATE_NAME, routing)
