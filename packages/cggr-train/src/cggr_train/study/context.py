"""The starting point of every measurement: the arm's model, learner, optimizer and data on the device."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cggr_train.data import TokenStore
from cggr_train.device import uses_bfloat16
from cggr_train.loop import Budget, LearningRate, LoopSettings
from cggr_train.presets import build_config, build_model, load_model
from cggr_train.recorded import StepGraph
from cggr_train.session import RunSession, SessionSettings
from cggr_train.study.arms import Arm, load_arms
from cggr_train.study.settings import StudySettings
from cggr_train.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEPT_PARAMETERS = 10**9
"""Size limit of models that are kept in memory between runs."""
WARMUP = 0.05
"""Share of the standard arm's steps over which every arm's learning rate warms up."""


def tuning_sequences(settings: StudySettings, tokens: int) -> int:
    """Sequences at the end of the training text that are used only to choose learning rates."""
    if not settings.rates:
        return 0
    return min(settings.train.eval_sequences, max(1, tokens // settings.train.length // 10))


def graph_of_steps(settings: StudySettings, arms: Iterable[Arm]) -> StepGraph:
    """What of the steps is captured: by itself every arm's passes or, where one arm's cannot be, those of none."""
    asked = settings.train.cuda_graph
    return False if asked == "auto" and any(arm.scores_from_own_run for arm in arms) else asked


class StudyContext:
    """A study's folder, seen from one device.

    Args:
        folder: Written by :func:`cggr_train.study.run.start_study`: settings, tokenizer, tokens, arms.
        device: Where models go.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.settings = StudySettings.load(folder)
        whole = TokenStore.open(folder / "tokens")
        length = self.settings.train.length
        aside = tuning_sequences(self.settings, len(whole.train)) * length
        self.tokens = whole._replace(train=whole.train[: len(whole.train) - aside])
        self.tuning_tokens = whole.train[len(whole.train) - aside :]
        self.arms = {arm.name: arm for arm in load_arms(folder)}
        self.cuda_graph: StepGraph = graph_of_steps(self.settings, self.arms.values())
        self._kept: PreTrainedModel | None = None
        self.bfloat16 = uses_bfloat16(self.settings.train.precision, device)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The study's tokenizer."""
        return load_tokenizer(str(self.folder / "tokenizer"))

    def model(self, seed: int, *, folder: Path | None = None) -> PreTrainedModel:
        """The starting weights of every arm at this seed, or those in ``folder``."""
        train = self.settings.train
        source = str(folder) if folder is not None else train.model
        if source is not None:
            model = load_model(source) if folder is not None or self.device.type == "cpu" else self._copy(source)
        else:
            assert train.config is not None
            model = build_model(
                build_config(train.config, vocab_size=len(self.tokenizer), length=train.length), seed=seed
            )
        torch.nn.Module.to(model, self.device)
        return model

    def _copy(self, source: str) -> PreTrainedModel:
        """A copy of the study's model; a small model is read once and kept in host memory."""
        if self._kept is None:
            model = load_model(source)
            if model.num_parameters() > KEPT_PARAMETERS:
                return model
            self._kept = model
        return copy.deepcopy(self._kept)

    def session(
        self,
        arm: Arm,
        seed: int,
        *,
        steps: int,
        warmup_steps: float,
        eval_sequences: int,
        weights: Path | None = None,
        tuning: bool = False,
        still: bool = False,
    ) -> RunSession:
        """One run, ready to train.

        Args:
            arm: How to train.
            seed: Seed of weights, data order and selections.
            steps: Steps of the whole run.
            warmup_steps: Steps over which the learning rate warms up to its constant value, see
                :mod:`cggr_train.study.average`.
            eval_sequences: Held-out sequences of an evaluation.
            weights: A checkpoint whose weights replace the seed's starting weights.
            tuning: Evaluate on the sequences for choosing learning rates, instead of the held-out ones.
            still: Use a learning rate of 0.
        """
        train = self.settings.train
        rate = 0.0 if still else arm.learning_rate or train.learning_rate
        loop = LoopSettings(
            budget=Budget(steps),
            learning_rate=LearningRate(rate, warmup=min(0.5, warmup_steps / steps), final=1.0),
            accumulate=arm.batch_size // arm.forward_size,
            clip=train.clip or None,
            bfloat16=self.bfloat16,
            cuda_graph=self.cuda_graph,
        )
        settings = SessionSettings(
            arm.method, arm.routing, length=train.length, batch_size=arm.forward_size, seed=seed,
            weight_decay=train.weight_decay, loop=loop, eval_sequences=eval_sequences, eval_batch=train.batch_size,
            checkpointing=arm.checkpointing,
        )  # fmt: skip
        tokens = self.tokens._replace(heldout=self.tuning_tokens) if tuning else self.tokens
        return RunSession(settings, self.model(seed, folder=weights), tokens, self.device, resumed=weights)
