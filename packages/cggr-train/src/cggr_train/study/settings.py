"""The settings of a study, saved in its folder as ``study.json`` next to the ``settings.json`` of training."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cggr_core.settings import KEY_VALUE_MODES, SUPERVISED, RoutingSettings
from cggr_train.errors import InputError
from cggr_train.option_checks import check_number, check_routing
from cggr_train.settings import STUDY, TrainSettings
from cggr_train.study.arms import CONTROLS

EQUAL = ("tokens", "time")
TRAINING = "settings.json"


@dataclass(frozen=True)
class StudySettings:
    """Settings of a study; see ``cggr study --help`` for each.

    Attributes:
        train: Shared by all arms: data, model, sizes, learning rate. ``steps`` or ``seconds`` apply to the standard
            arm; ``seed`` is the first of the seeds; ``routing`` holds what the four lists do not set.
        gradients: Gradient modes of the requested arms.
        ratios: Their keep ratios.
        selections: Their strategies.
        scorings: Their scores.
        routers: Routers, each of :data:`cggr_core.settings.ROUTERS`; empty takes the one of ``train.routing``.
        context_precisions: Precisions of the linear layers on tokens that need no gradient; None is the model's own.
        context_margins: For arms of supervised tokens: how many tokens before them gradients also reach.
        batch_sizes: Further standard arms, in sequences per step.
        seeds: Runs of each arm.
        equal: What every run must reach: the standard arm's ``tokens``, its ``time``, or both.
        evaluations: Points of each curve.
        draws: Gradient estimates per arm and held-out batch; 0 skips gradients.
        gradient_batches: Held-out batches on which gradients are compared.
        parallel: Parallel runs on one device; None means one on an accelerator and one per core on a CPU.
        calibration_seconds: Total time for timing each arm's step, over all turns.
        controls: Standard arms besides the first, each of :data:`cggr_train.study.arms.CONTROLS`.
        memory_limit: Limit in bytes for each arm's step, met with the largest micro-batch that fits, and with
            checkpointing only if nothing fits without it.
        rates: Learning rates to try for each arm, with a separate seed and on sequences used neither for training nor
            for evaluation; each arm uses its best. Empty gives all arms the rate of ``train``.
        rate_share: Length of each trial, as a share of the arm's run.
        accuracy: Answer the held-out questions.
        accuracy_readings: When they are answered: at the end of each arm's ``time``, and at equal ``tokens``. Arms are
            compared by accuracy if it is measured at the end of their time.
        accuracy_of: Names of the arms that answer; empty for all.
        timing_turns: How often each arm is timed; arms take turns, so that a slowdown of the machine affects all of
            them.
        answer_after: Marker before the compared part of an answer; None compares whole answers.
        questions: Number of questions to ask; None asks all.

    Raises:
        InputError: If a number is out of range or a list is empty.
    """

    train: TrainSettings
    gradients: tuple[str, ...] = (RoutingSettings.gradient,)
    ratios: tuple[float, ...] = (RoutingSettings.min_tokens_ratio,)
    selections: tuple[str, ...] = (RoutingSettings.selection,)
    scorings: tuple[str, ...] = (RoutingSettings.scoring,)
    routers: tuple[str, ...] = ()
    context_precisions: tuple[str | None, ...] = (None,)
    context_margins: tuple[int, ...] = (RoutingSettings.context_margin,)
    batch_sizes: tuple[int, ...] = ()
    seeds: int = 3
    equal: tuple[str, ...] = EQUAL
    evaluations: int = 8
    draws: int = 8
    gradient_batches: int = 2
    parallel: int | None = None
    calibration_seconds: float = 4.0
    controls: tuple[str, ...] = CONTROLS
    memory_limit: int | None = None
    rates: tuple[float, ...] = ()
    rate_share: float = 0.5
    accuracy: bool = False
    accuracy_readings: tuple[str, ...] = ("time",)
    accuracy_of: tuple[str, ...] = ()
    timing_turns: int = 2
    answer_after: str | None = None
    questions: int | None = None

    def __post_init__(self) -> None:
        if (self.train.steps is None) == (self.train.seconds is None):
            raise InputError("give the length of the standard run with either --steps or --seconds")
        if self.train.accumulate != 1:
            raise InputError(f"--accumulate must be 1 in a study, got {self.train.accumulate}")
        for name in ("gradients", "ratios", "selections", "scorings", "context_precisions", "context_margins", "equal"):
            if not getattr(self, name):
                raise InputError(f"--{name.removesuffix('s').replace('_', '-')} is empty; give at least one")
        unknown = [name for name in self.equal if name not in EQUAL]
        if unknown:
            raise InputError(f"--equal must be {', '.join(EQUAL)} or both, got {unknown[0]!r}")
        minimum: dict[str, float] = {"seeds": 1, "timing_turns": 1, "evaluations": 1, "draws": 0, "gradient_batches": 1}
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        if self.draws == 1:
            raise InputError("--draws must be 0 (no gradients) or at least 2 (for a variance), got 1")
        if self.parallel is not None and self.parallel < 1:
            raise InputError(f"--parallel must be at least 1, got {self.parallel}")
        check_number("--calibration-seconds", self.calibration_seconds, above=0)
        strange = [name for name in self.controls if name not in CONTROLS]
        if strange:
            raise InputError(f"--controls must be one or more of {', '.join(CONTROLS)}, got {strange[0]!r}")
        if self.memory_limit is not None:
            check_number("--memory-limit", self.memory_limit, above=0)
        for rate in self.rates:
            check_number("--rates", rate, above=0)
        if not 0 < self.rate_share <= 1:
            raise InputError(f"--rate-share must be in (0, 1], got {self.rate_share}")
        if self.accuracy and self.train.answer is None:
            raise InputError("--eval exact-match needs answers: give their key with --answer")
        if self.accuracy and self.accuracy_of and "time" in self.accuracy_readings:
            raise InputError(
                "accuracy_of limits accuracy to some arms, so arms cannot be compared by accuracy at equal time"
            )
        if self.accuracy and "time" not in self.equal:
            raise InputError("--eval exact-match compares arms at equal time: include time in --equal")
        strange = [name for name in self.accuracy_readings if name not in EQUAL]
        if strange:
            raise InputError(f"accuracy_readings must be {', '.join(EQUAL)} or both, got {strange[0]!r}")
        if self.answer_after is not None and not self.accuracy:
            raise InputError("--answer-after requires --eval exact-match")
        if self.questions is not None and self.questions < 1:
            raise InputError(f"--questions must be at least 1, got {self.questions}")
        if any(size < 1 for size in self.batch_sizes):
            raise InputError(f"--control-batch must be at least 1, got {min(self.batch_sizes)}")
        self._check_context_precisions()
        self._check_context_margins()
        given = {"gradient": self.gradients, "ratio": self.ratios, "selection": self.selections,
                 "scoring": self.scorings, "router": self.routers}  # fmt: skip
        for name, values in given.items():
            for value in values:
                check_routing(dataclasses.replace(self.train.routing, **{name: value}), labelled=self._labelled)

    @property
    def _labelled(self) -> bool:
        return self.train.answer is not None or self.train.messages is not None

    def _check_context_precisions(self) -> None:
        low = [precision for precision in self.context_precisions if precision is not None]
        if not low:
            return
        routed = [gradient for gradient in self.gradients if gradient in KEY_VALUE_MODES]
        if not routed:
            raise InputError(
                f"--context-precision {low[0]} requires --gradient {' or '.join(KEY_VALUE_MODES)}, which have tokens "
                f"that need no gradient, got {', '.join(self.gradients)}"
            )
        for precision in low:
            check_routing(
                dataclasses.replace(self.train.routing, gradient=routed[0], context_precision=precision),
                labelled=self._labelled,
            )

    def _check_context_margins(self) -> None:
        for margin in self.context_margins:
            check_number("--context-margin", margin, least=0)
        routed = any(gradient in KEY_VALUE_MODES for gradient in self.gradients)
        if any(self.context_margins) and not (routed and SUPERVISED in self.selections):
            raise InputError(
                f"--context-margin {max(self.context_margins)} requires an arm with --selection supervised and "
                f"--gradient {' or '.join(KEY_VALUE_MODES)}, but there is none; leave it out"
            )

    def save(self, folder: Path) -> None:
        """Write both files into the study's folder."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "train"}
        self.train.save(folder / TRAINING)
        (folder / STUDY).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> StudySettings:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If a file is missing or not of this version.
        """
        train = TrainSettings.load(folder / TRAINING)
        try:
            values: dict[str, Any] = json.loads((folder / STUDY).read_text(encoding="utf-8"))
            lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
            return cls(train=train, **{**values, **lists})
        except (OSError, json.JSONDecodeError, TypeError) as error:
            raise InputError(f"{folder} holds no study that can be resumed ({error})") from error
