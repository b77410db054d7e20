"""Everything that defines a run of ``cggr train``, as written to ``settings.json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cggr_train.errors import InputError
from cggr_train.learner import Routing
from cggr_train.option_checks import check_number, check_routing, check_seed
from cggr_train.recorded import StepGraph

STUDY = "study.json"
"""Next to the settings of training, in the folder of a study."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of one run; see ``cggr train --help`` for each.

    Raises:
        InputError: If a number is out of range or the model is not given exactly once.
    """

    data: tuple[str, ...]
    model: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 8192
    field: str = "text"
    answer: str | None = None
    messages: str | None = None
    heldout: tuple[str, ...] = ()
    heldout_fraction: float = 0.02
    skip_bad: bool = False
    method: str = "cggr"
    routing: Routing = dataclasses.field(default_factory=Routing)
    length: int = 512
    batch_size: int = 8
    accumulate: int = 1
    steps: int | None = None
    seconds: float | None = None
    learning_rate: float = 1e-3
    lr_warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_sequences: int = 64
    save_every: int = 200
    keep: int = 2
    device: str = "auto"
    precision: str = "auto"
    cuda_graph: StepGraph = "auto"

    def __post_init__(self) -> None:
        if (self.model is None) == (self.config is None):
            raise InputError("give either a model directory (--model) or a size to train from scratch (--config)")
        minimum = {"length": 2, "batch_size": 1, "accumulate": 1, "vocab_size": 257, "log_every": 1, "eval_every": 1}
        minimum |= {"eval_sequences": 1, "save_every": 1, "keep": 1}
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(self, name)}")
        check_number("--learning-rate", self.learning_rate, above=0)
        check_number("--weight-decay", self.weight_decay, least=0)
        check_number("--clip", self.clip, least=0)
        for option, budget in (("--steps", self.steps), ("--seconds", self.seconds)):
            if budget is not None:
                check_number(option, budget, above=0)
        check_seed(self.seed)
        check_routing(self.routing, labelled=self.answer is not None or self.messages is not None)
        if self.messages is not None and self.answer is not None:
            raise InputError("give either --messages or an answer (--answer, or --field a,b with --model), not both")
        if not 0 < self.heldout_fraction <= 0.5:
            raise InputError(f"--heldout-fraction must be in (0, 0.5], got {self.heldout_fraction}")
        if not 0 <= self.lr_warmup < 1:
            raise InputError(f"--lr-warmup must be in [0, 1), got {self.lr_warmup}")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise InputError(f"--precision must be auto, float32 or bfloat16, got {self.precision!r}")
        if self.cuda_graph not in (True, False, "auto"):
            raise InputError(f"cuda_graph must be True, False or 'auto', got {self.cuda_graph!r}")

    def save(self, path: Path) -> None:
        """Write the settings as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> TrainSettings:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: If the file is missing or not of this version.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            values["routing"] = Routing(**values["routing"])
            values["data"], values["heldout"] = tuple(values["data"]), tuple(values["heldout"])
            return cls(**values)
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise InputError(f"{path.parent} holds no run that can be resumed ({error})") from error
