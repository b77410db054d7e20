"""What every measurement of a study starts from: the arm's model, learner, optimizer and data on the device."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cggr_train.data import Batches, TokenStore
from cggr_train.data.batches import in_order
from cggr_train.device import uses_bfloat16
from cggr_train.learner import Learner, build_learner
from cggr_train.loop import Budget, LearningRate, LoopSettings, build_optimizer
from cggr_train.presets import build_config, build_model, load_model
from cggr_train.remembered_file import FILE_NAME, fingerprint, load_remembered
from cggr_train.study.arms import Arm, load_arms
from cggr_train.study.settings import StudySettings
from cggr_train.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cggr_core.experimental import RememberedScores

WARMUP = 0.05
"""Share of the standard arm's steps over which every arm's learning rate comes up."""


class Training(NamedTuple):
    """An arm ready to train."""

    learner: Learner
    optimizer: torch.optim.Optimizer
    batches: Batches


class StudyContext:
    """A study's folder, seen from one device.

    Args:
        folder: Written by :func:`cggr_train.study.run.start_study`: settings, tokenizer, tokens, arms.
        device: Where models go.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.settings = StudySettings.load(folder)
        self.tokens = TokenStore.open(folder / "tokens")
        self.arms = {arm.name: arm for arm in load_arms(folder)}
        self.bfloat16 = uses_bfloat16(self.settings.train.precision, device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The study's tokenizer."""
        return load_tokenizer(str(self.folder / "tokenizer"))

    def model(self, seed: int, *, folder: Path | None = None) -> PreTrainedModel:
        """The weights that every arm of this seed starts from, or those in ``folder``."""
        train = self.settings.train
        source = str(folder) if folder is not None else train.model
        if source is not None:
            model = load_model(source)
        else:
            assert train.config is not None
            model = build_model(
                build_config(train.config, vocab_size=len(self.tokenizer), length=train.length), seed=seed
            )
        torch.nn.Module.to(model, self.device)
        return model

    def training(self, arm: Arm, seed: int, *, weights: Path | None = None) -> Training:
        """Model (with the weights in a checkpoint, where given), optimizer and data of one run."""
        model = self.model(seed, folder=weights)
        torch.manual_seed(seed)
        train = self.settings.train
        batches = Batches(self.tokens.train, length=train.length, batch_size=arm.batch_size, seed=seed)
        memory = self._memory(batches, weights) if arm.remembers else None
        learner = build_learner(model, arm.method, arm.routing, seed=seed, memory=memory)
        optimizer = build_optimizer(model, weight_decay=train.weight_decay, capturable=train.cuda_graph)
        return Training(learner, optimizer, batches)

    def _memory(self, batches: Batches, checkpoint: Path | None) -> RememberedScores:
        from cggr_core.experimental import RememberedScores

        if checkpoint is not None:
            return load_remembered(checkpoint / FILE_NAME, examples=fingerprint(batches.sequences))
        return RememberedScores.empty(examples=batches.num_sequences, length=batches.length)

    def loop(self, steps: int, *, warmup_steps: float) -> LoopSettings:
        """Optimisation of one run: up to a constant learning rate, see :mod:`cggr_train.study.average`."""
        train = self.settings.train
        return LoopSettings(
            budget=Budget(steps),
            learning_rate=LearningRate(train.learning_rate, warmup=min(0.5, warmup_steps / steps), final=1.0),
            clip=train.clip or None,
            bfloat16=self.bfloat16,
            cuda_graph=train.cuda_graph,
        )

    def heldout(self, sequences: int) -> list[Tensor]:
        """Held-out batches of every evaluation, ``sequences`` in all; batches of a training step's size at most."""
        train = self.settings.train
        return in_order(self.tokens.heldout, length=train.length, batch_size=train.batch_size, limit=sequences)
