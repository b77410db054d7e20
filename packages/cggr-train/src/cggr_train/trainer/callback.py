"""The state of the routing, moved on with the optimizer and kept in the Trainer's checkpoints."""

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
    """The side of a Trainer that the callback sees."""

    resumed_from: Path | None

    def routed_model(self) -> CGGRModel:
        """The model whose schedule is moved on and saved."""
        ...

    def forget_steps(self) -> None:
        """Begin counting anew."""
        ...

    def step_routing(self) -> None:
        """Move the keep ratio on by one optimizer step."""
        ...


class CGGRCallback(TrainerCallback):
    """Moves the schedule of the keep ratio and saves it; added by :class:`~cggr_train.trainer.CGGRMixin`.

    A checkpoint gets ``cggr_state.json`` and ``cggr_state.safetensors``, from which a resumed run makes the selections
    of the uninterrupted one. Without them (a checkpoint of a plain Trainer) the schedule starts at the checkpoint's
    step.
    """

    def __init__(self, trainer: RoutedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin the schedule, or continue it where the checkpoint left it."""
        routed = self._trainer.routed_model()
        self._trainer.forget_steps()
        checkpoint = self._trainer.resumed_from
        if state.global_step and checkpoint is not None and (checkpoint / f"{STATE_NAME}.json").exists():
            routed.load_routing_state_dict(load_state(checkpoint, STATE_NAME))
        else:
            routed.load_routing_state_dict({**routed.routing_state_dict(), "steps": state.global_step})

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the keep ratio on by one optimizer step."""
        self._trainer.step_routing()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the state into the checkpoint that was just saved."""
        routing = self._trainer.routed_model().routing_state_dict()
        folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # The trials of a hyperparameter search save elsewhere; none of them is resumed.
        if state.is_world_process_zero and not state.is_hyper_param_search:
            save_state(folder, STATE_NAME, routing)
