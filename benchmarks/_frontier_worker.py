"""A worker process of `benchmarks.frontier`, which does one task after another."""

from __future__ import annotations

import logging
import os
import traceback
from functools import cached_property
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks._frontier_arms import SETTINGS, Arm, Setting
from benchmarks._frontier_data import Rows, load
from benchmarks._frontier_training import release, time_arm, train
from cggr_train.errors import RunError

ANSWER_TOKENS = 256


class Worker:
    """The state of a worker.

    Args:
        told: ``setting``, ``rows`` (file), ``weights`` (folder of the prepared model), ``model`` (what it is made of),
            ``config`` (file, or None), ``tokenizer``, ``device``, ``questions`` and ``questions_at_a_time``.
    """

    def __init__(self, told: dict[str, Any]) -> None:
        self.told = told
        self.setting: Setting = SETTINGS[told["setting"]]
        self.device = torch.device(told["device"])

    @cached_property
    def rows(self) -> Rows:
        return load(Path(self.told["rows"]), limit=self.setting.limit)[0]

    @cached_property
    def base(self) -> Any:
        from cggr_train.presets import load_model

        model: Any = load_model(str(self.told["weights"]))
        return model.to(self.device)

    @cached_property
    def untrained(self) -> Any:
        """A model of the same sizes with random weights, on which a step's time does not depend."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if self.told["config"] is None:
            return self.base
        config = AutoConfig.from_pretrained(self.told["config"])
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    @cached_property
    def tokenizer(self) -> Any:
        from cggr_train.tokenizer import load_tokenizer

        return load_tokenizer(str(self.told["tokenizer"]))

    @cached_property
    def ends(self) -> Tensor | None:
        """See :func:`benchmarks._frontier_units.line_ends`; None if no way needs it."""
        from benchmarks._frontier_units import line_ends

        needed = any(way.unit == "sentences" for way in self.setting.ways.values())
        return line_ends(self.tokenizer) if needed else None

    def weights(self) -> dict[str, Any]:
        """Write the model in a form that a process loads within a second."""
        from cggr_train.presets import load_model

        folder = Path(self.told["weights"])
        if not folder.exists():
            temporary = folder.with_name(f"{folder.name}.part")
            load_model(str(self.told["model"])).save_pretrained(temporary)
            temporary.rename(folder)
        return {}

    def time(self, *, arm: str, itself: bool = True) -> dict[str, Any]:
        """See :func:`benchmarks._frontier_training.time_arm`."""
        found: Arm = self.setting.arms[arm]
        return time_arm(self.untrained, self.rows, self.setting, found, itself=itself, ends=self.ends)

    def train(
        self, *, way: str, seed: int, recorded: bool, keep: dict[int, str] | None = None, **given: Any
    ) -> dict[str, Any]:  # fmt: skip
        """See :func:`benchmarks._frontier_training.train`; ``keep`` has files for the weights of some steps."""
        self.__dict__.pop("untrained", None)

        def saved_to(path: str) -> Any:
            def save(model: Any) -> None:
                state = {name: p.detach().to("cpu", torch.bfloat16) for name, p in model.named_parameters()}
                torch.save(state, f"{path}.part")
                os.replace(f"{path}.part", path)

            return save

        callbacks = {step: saved_to(path) for step, path in (keep or {}).items()}
        try:
            return train(
                self.base, self.rows, self.setting, self.setting.ways[way], seed=seed, recorded=recorded,
                keep=callbacks, ends=self.ends, **given,
            )  # fmt: skip
        except RunError as error:
            if not recorded:
                raise
            print(f"{way}, seed {seed}: {error}; again, not recorded", flush=True)
        finally:
            release(self.device)
        return self.train(way=way, seed=seed, recorded=False, keep=keep, **given)

    @cached_property
    def asked(self) -> tuple[list[list[int]], list[str | None]]:
        """Questions of the test rows, and their final answers."""
        from benchmarks.gsm8k import MARK
        from cggr_train.exact_match import final_answer

        every = self.rows.test
        chosen = torch.linspace(0, len(every) - 1, min(self.told["questions"], len(every))).round().long()
        questions, answers = [], []
        for row in every[chosen]:
            places = (row >= 0).nonzero().flatten()
            questions.append((-1 - row[: int(places[0])]).tolist())
            answers.append(final_answer(self.tokenizer.decode(row[places], skip_special_tokens=True), MARK))
        return questions, answers

    @cached_property
    def greedy(self) -> Any:
        from benchmarks._greedy import Greedy

        at_a_time = min(self.told["questions_at_a_time"], len(self.asked[0]))
        return Greedy(
            self.base, end=self.tokenizer.eos_token_id, rows=at_a_time, prompt=max(map(len, self.asked[0])),
            new=ANSWER_TOKENS,
        )  # fmt: skip

    def answer(self, *, path: str | None) -> dict[str, Any]:
        """Which test problems saved weights answer correctly; without a path, those of the untrained model."""
        from benchmarks.gsm8k import MARK
        from cggr_train.exact_match import final_answer

        questions, wanted = self.asked
        if path is None:
            weights: dict[str, Tensor] = dict(self.base.named_parameters())
        else:
            weights = torch.load(path, weights_only=True)
        self.greedy.load(weights)
        texts = self.tokenizer.batch_decode(self.greedy(questions), skip_special_tokens=True)
        right = [n for n, (text, answer) in enumerate(zip(texts, wanted, strict=True))
                 if final_answer(text, MARK) == answer]  # fmt: skip
        if path is not None:
            Path(path).unlink()
        return {"right": right, "questions": len(questions), "example": texts[0][-300:]}


def serve(pipe: Connection, told: dict[str, Any]) -> None:
    """Answer tasks until the pipe closes: ``{"do": method, **arguments}``."""
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("cggr_core").setLevel(logging.INFO)
    torch.set_num_threads(told["threads"])
    if told["device"] != "cpu":
        torch.cuda.set_device(told["device"])
    worker = Worker(told)
    while True:
        try:
            task = dict(pipe.recv())
        except (EOFError, OSError):  # the coordinator has ended
            return
        try:
            result = getattr(worker, task.pop("do"))(**task)
        except Exception as error:  # the coordinator reports any error and continues
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
        try:
            pipe.send(result)
        except OSError:
            return
