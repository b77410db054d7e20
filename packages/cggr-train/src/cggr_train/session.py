"""One training run in one process: built, resumed, trained, evaluated and saved.

``cggr train``, the arms of a study and the benchmarks all train through :class:`RunSession` and differ only in what
they do between steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_train.checkpoint import (
    TrainingState,
    checkpoint_path,
    load_training_state,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from cggr_train.data import Batches, TokenStore
from cggr_train.data.batches import in_order
from cggr_train.errors import InputError
from cggr_train.evaluate import heldout_loss
from cggr_train.learner import Routing, build_learner
from cggr_train.loop import Clock, LoopSettings, Progress, build_optimizer, train_steps
from cggr_train.ranks import ALONE, Ranks
from cggr_train.remembered_file import FILE_NAME, fingerprint, load_remembered, save_remembered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cggr_core.experimental import RememberedScores


@dataclass(frozen=True)
class SessionSettings:
    """Settings of one run.

    Attributes:
        method: See :func:`cggr_train.learner.build_learner`.
        routing: Settings of the routed methods.
        length: Tokens of a sequence.
        batch_size: Sequences of one forward; ``loop.accumulate`` of them make a step.
        seed: Seed of data order and selections.
        weight_decay: Of matrices.
        loop: Optimisation settings.
        eval_sequences: Held-out sequences of an evaluation; None takes all.
        eval_batch: Sequences of one forward of an evaluation; None takes ``batch_size``.
        checkpointing: Recompute activations in the backward pass instead of keeping them.
    """

    method: str
    routing: Routing
    length: int
    batch_size: int
    seed: int
    weight_decay: float
    loop: LoopSettings
    eval_sequences: int | None = None
    eval_batch: int | None = None
    checkpointing: bool = False


class RunSession:
    """A model with its method, optimizer and data on a device.

    Args:
        settings: Settings of the run.
        model: A Hugging Face causal language model; moved to ``device``. To continue from a checkpoint, pass a model
            with its weights and then call :meth:`resume`.
        tokens: The data.
        device: Where to train.
        ranks: The processes that share each step.
        resumed: The checkpoint whose remembered scores to continue from.

    Attributes:
        learner: The method.
        optimizer: Over the model's parameters.
        batches: The training data, in the order of the seed.
        heldout: The batches of an evaluation.
        progress: Progress of the run.
        clock: Of the training time.

    Raises:
        InputError: If a setting does not suit the model.
    """

    def __init__(
        self,
        settings: SessionSettings,
        model: PreTrainedModel,
        tokens: TokenStore,
        device: torch.device,
        *,
        ranks: Ranks = ALONE,
        resumed: Path | None = None,
    ) -> None:
        self.settings, self.model, self.device, self.ranks = settings, model, device, ranks
        torch.nn.Module.to(model, device)
        if settings.checkpointing:
            checkpoint_activations(model)
        torch.manual_seed(settings.seed)
        self.batches = Batches(tokens.train, length=settings.length, batch_size=settings.batch_size, seed=settings.seed)
        self.heldout = in_order(
            tokens.heldout, length=settings.length, batch_size=settings.eval_batch or settings.batch_size,
            limit=settings.eval_sequences,
        )  # fmt: skip
        self.memory: RememberedScores | None = None
        if settings.method == "cggr" and settings.routing.scorer == "remembered":
            self.memory = self._remembered(resumed)
        self.learner = build_learner(
            model, settings.method, settings.routing, seed=settings.seed, memory=self.memory,
            labelled=tokens.train.dtype.kind != "u" and not settings.loop.whole_graph,
            cuda_graph="auto" if settings.loop.cuda_graph == "auto" else False,
        )  # fmt: skip
        self.learner.wrapped = ranks.wrap(model, device)
        if ranks.size > 1:
            torch.manual_seed(settings.seed + ranks.rank)  # every rank has its own dropout masks
        self.optimizer = build_optimizer(
            model, weight_decay=settings.weight_decay, capturable=settings.loop.whole_graph
        )
        self.progress = Progress()
        self.clock = Clock(device)

    def _remembered(self, resumed: Path | None) -> RememberedScores:
        from cggr_core.experimental import RememberedScores

        if resumed is not None:
            return load_remembered(resumed / FILE_NAME, examples=fingerprint(self.batches.sequences))
        return RememberedScores.empty(examples=self.batches.num_sequences, length=self.batches.length)

    def resume(self, checkpoint: Path) -> dict[str, Any]:
        """Restore the state of a checkpoint, and return the ``extra`` saved with it.

        Raises:
            InputError: If the checkpoint cannot be read.
        """
        state = load_training_state(checkpoint)
        self.progress = state.progress
        self.optimizer.load_state_dict(state.optimizer)
        extra = dict(state.learner)
        self.learner.load_state_dict(extra.pop("learner"))
        restore_random_state(state.random, self.device, self.ranks)
        return extra

    def train(self, on_step: Callable[[Tensor, float], None], *, stop: Callable[[], bool] = lambda: False) -> None:
        """Train until the budget is spent or ``stop()`` returns true; see :func:`cggr_train.loop.train_steps`."""
        self.clock = Clock(self.device, elapsed=self.progress.seconds)
        train_steps(
            self.learner, self.optimizer, self.batches, self.settings.loop, self.progress, self.clock,
            on_step=on_step, stop=stop, ranks=self.ranks,
        )  # fmt: skip

    def evaluate(self, *, weights: AbstractContextManager[Any] | None = None) -> float:
        """Loss on the held-out batches, in nats per supervised token, with the clock stopped.

        Args:
            weights: Context entered during the evaluation, to swap in averaged weights, say.
        """
        with self.clock.paused(), weights or nullcontext():
            return heldout_loss(
                self.model,
                self.heldout[self.ranks.rank :: self.ranks.size],
                device=self.device,
                bfloat16=self.settings.loop.bfloat16,
                reduce=self.ranks.sum,
            )

    def save(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, *, keep: int, extra: dict[str, Any] | None = None
    ) -> Path:
        """Write a checkpoint that :meth:`resume` reads, with the clock stopped.

        Args:
            folder: Of all checkpoints of the run.
            tokenizer: Saved with the model.
            keep: Number of newest checkpoints to keep.
            extra: Data to return on resume.

        Returns:
            The checkpoint.

        Raises:
            SaveError: If it cannot be written; earlier ones are unchanged.
        """
        learner = {**(extra or {}), "learner": self.learner.state_dict()}
        with self.clock.paused():
            random = random_state(self.device, self.ranks)
            state = TrainingState(self.progress, self.optimizer.state_dict(), learner, random)
            if self.memory is not None:
                self.memory.flush()  # on every rank, so that all continue from the same scores
            also = None if self.memory is None else self._save_memory
            self.ranks.on_rank_zero(lambda: save_checkpoint(folder, self.model, tokenizer, state, keep=keep, also=also))
        return checkpoint_path(folder, self.progress.step)

    def _save_memory(self, checkpoint: Path) -> None:
        assert self.memory is not None  # otherwise unused
        save_remembered(checkpoint / FILE_NAME, self.memory, examples=fingerprint(self.batches.sequences))


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Enable activation checkpointing, under its name in this version of transformers.

    Raises:
        InputError: If the architecture does not support it.
    """
    enable: Any = getattr(model, "activation_checkpointing_enable", None)
    try:
        if enable is None:  # before transformers 5.20
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"{type(model).__name__} cannot be trained with gradient checkpointing ({error})") from error
