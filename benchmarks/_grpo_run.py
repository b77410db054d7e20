"""One run of :mod:`benchmarks.grpo_gsm8k`: TRL's GRPOTrainer on GSM8K with one of its arms."""

import argparse
import copy
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import _record
from benchmarks._grpo_problems import END_OF_START, Task, encode, right, task, with_end_of_turn
from benchmarks._rollouts import Rollouts
from benchmarks.gsm8k import read_problems
from cggr_core.stopwatch import Stopwatch
from cggr_train import CGGRConfig, CGGRMixin
from cggr_train.presets import load_model
from cggr_train.tokenizer import load_tokenizer

CONTROL = "full update"
ARMS: dict[str, dict[str, Any]] = {
    CONTROL: {},
    "top 20%, masked": {"top_entropy_quantile": 0.2},
    "top 20%, kv": {"top_entropy_quantile": 0.2, "cggr": {}},
    "random 20%, kv": {"cggr": {"selection": "random", "min_tokens_ratio": 0.2}},
}
_SETTINGS = (
    "start_steps", "rollouts", "group", "prompt", "completion", "rows", "routed_rows", "rate", "steps", "questions",
    "evaluate_every", "per_device",
)  # fmt: skip
_RESERVE = 25.0  # seconds for the last evaluation and writing


@dataclass(frozen=True)
class Setup:
    """The parts of a run."""

    tokenizer: Any
    model: Any
    problems: Task
    heldout: Task
    rollouts: Rollouts


def set_up(options: argparse.Namespace) -> Setup:
    """Load the model, the problems and the sampler."""
    tokenizer = with_end_of_turn(load_tokenizer(str(options.model)))
    model: Any = load_model(str(options.model))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    train, test = (read_problems(options.gsm8k / f"{name}.jsonl") for name in ("train", "test"))
    problems = task(train[END_OF_START:], tokenizer, options.prompt)
    heldout = task(test, tokenizer, options.prompt)
    asked = Task(heldout.prompts[: options.questions], heldout.answers[: options.questions])
    rollouts = Rollouts(model, tokenizer, rows=options.rollouts, prompt=options.prompt, new=options.completion)
    return Setup(tokenizer, model, problems, asked, rollouts)


class Sampler:
    """TRL's ``rollout_func``: completions of the current policy, with the same random draws in every arm."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self.setup, self.seed = setup, seed
        self.seconds = 0.0

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """Completions of a generation's prompts."""
        started = time.monotonic()
        rollouts, tokenizer = self.setup.rollouts, self.setup.tokenizer
        rollouts.load(trainer.accelerator.unwrap_model(trainer.model))
        ids = [encode(tokenizer, prompt) for prompt in prompts]
        completions = rollouts(ids, temperature=1.0, seed=1_000_003 * self.seed + trainer.state.global_step)
        self.seconds += time.monotonic() - started
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def trainer_of(
    setup: Setup, arm: str, seed: int, options: argparse.Namespace, folder: str, *, steps: int, callbacks: list[Any]
) -> tuple[Any, Sampler]:
    """An arm's trainer, which times its updates, and the sampler for it.

    Args:
        setup: What it trains.
        arm: One of :data:`ARMS`.
        seed: Of the order of the problems and of the sampling.
        options: Of the command.
        folder: For what TRL writes.
        steps: Optimizer steps.
        callbacks: Of the trainer.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer

    class Routed(CGGRMixin, GRPOTrainer):
        """The routed update."""

    class Plain(GRPOTrainer):
        """TRL's own update, timed as the routed one is."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.stopwatch, self.update = Stopwatch(), ExitStack()
            super().__init__(*args, **kwargs)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.update.enter_context(self.stopwatch.measure(self.accelerator.device))
            return super().compute_loss(*args, **kwargs)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            with self.update:  # entered where the loss begins, after the rollouts
                return super().training_step(*args, **kwargs)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:
                logs["update_seconds"] = self.stopwatch.read()
            super().log(logs, *args, **kwargs)

    set_seed(seed)
    settings = dict(ARMS[arm])
    cggr = settings.pop("cggr", None)
    cuda = torch.cuda.is_available()
    micro = options.rows if cggr is None else options.routed_rows
    arguments = GRPOConfig(
        folder, bf16=cuda, use_cpu=not cuda, learning_rate=options.rate, seed=seed, report_to="none",
        lr_scheduler_type="constant_with_warmup", warmup_steps=5, max_steps=steps, logging_steps=1,
        per_device_train_batch_size=micro, gradient_accumulation_steps=options.rollouts // 2 // micro,
        steps_per_generation=options.rollouts // micro, num_generations=options.group, save_strategy="no",
        max_completion_length=options.completion, gradient_checkpointing=False, disable_tqdm=True, **settings,
    )  # fmt: skip
    sampler = Sampler(setup, seed)
    given = {
        "model": setup.model, "args": arguments, "processing_class": setup.tokenizer, "reward_funcs": right,
        "train_dataset": Dataset.from_dict({"prompt": setup.problems.prompts, "answer": setup.problems.answers}),
        "rollout_func": sampler, "callbacks": callbacks,
    }  # fmt: skip
    trainer: Any = Plain(**given) if cggr is None else Routed(**given, cggr=CGGRConfig(**cggr))
    trainer.remove_callback(PrinterCallback)
    return trainer, sampler


def answers_of(setup: Setup) -> str:
    """Greedy answers to the held-out problems as a string of 1 (right) and 0, one per problem: ``"0110"``."""
    asked = [encode(setup.tokenizer, prompt) for prompt in setup.heldout.prompts]
    texts = setup.tokenizer.batch_decode(setup.rollouts(asked, temperature=0.0, seed=0), skip_special_tokens=True)
    return "".join(str(int(score)) for score in right(texts, setup.heldout.answers))


def before_path(options: argparse.Namespace) -> Path:
    """Path of the initial policy's answers, which all runs share."""
    return options.output / "runs" / f"{options.name}_before_{options.questions}_{options.completion}.json"


def train(arm: str, seed: int, options: argparse.Namespace, path: Path, wait: Callable[[], None]) -> None:
    """Train one run until ``options.until`` (seconds since the epoch), and write ``path`` at every evaluation.

    Args:
        arm: One of :data:`ARMS`.
        seed: Of the run.
        options: Of the command.
        path: File of the run.
        wait: Called once everything is loaded, before any computation.
    """
    from transformers import TrainerCallback

    began = time.monotonic()
    quiet()
    setup = set_up(options)
    print(f"{arm}, seed {seed}: model and data after {time.monotonic() - began:.0f} s", flush=True)
    found: dict[str, Any] = {
        "arm": arm, "seed": seed, "steps": [], "evaluations": [], "done": False,
        "settings": {
            "model": options.model.name.removesuffix(f"_{options.start_steps}"),
            **{name: getattr(options, name) for name in _SETTINGS},
        },
        "environment": _record.environment("cuda" if torch.cuda.is_available() else "cpu"),
    }  # fmt: skip
    spent = {"evaluations": 0.0}

    class Follow(TrainerCallback):
        """Evaluates, writes the results and ends the run in time."""

        def evaluate(self, step: int) -> None:
            """Greedy answers to the held-out problems; before training, the shared ones if they exist."""
            started = time.monotonic()
            known = before_path(options)
            if step == 0 and known.exists():
                answers = json.loads(known.read_text(encoding="utf-8"))["right"]
            else:
                setup.rollouts.load(trainer.accelerator.unwrap_model(trainer.model))
                answers = answers_of(setup)
            found["evaluations"].append({"step": step, "right": answers})
            accuracy = statistics.fmean(map(int, answers))
            spent["evaluations"] += time.monotonic() - started
            note(trainer.state.log_history)
            print(f"{arm}, seed {seed}, step {step}: {accuracy:.1%} after {time.monotonic() - began:.0f} s", flush=True)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.evaluate(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            late = time.time() > options.until - _RESERVE
            control.should_training_stop = state.global_step >= options.steps or late

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            norm = (logs or {}).get("grad_norm", 0.0)
            if not math.isfinite(norm):
                raise SystemExit(f"{arm}, seed {seed}, step {state.global_step}: the gradient's norm is {norm}")
            if state.global_step % options.evaluate_every == 0 and found["evaluations"][-1]["step"] < state.global_step:
                self.evaluate(state.global_step)

    def note(history: list[dict[str, Any]]) -> None:
        names = ("reward", "update_seconds", "keep_ratio", "completions/mean_length", "frac_reward_zero_std", "entropy")
        found["steps"] = [
            {"step": row["step"], **{name: row[name] for name in names if name in row}}
            for row in history
            if "loss" in row
        ]
        found["spent"] = {"all": time.monotonic() - began, "rollouts": sampler.seconds, **spent}
        if torch.cuda.is_available():
            found["peak_bytes"] = torch.cuda.max_memory_reserved()
        write_json(path, found)

    with tempfile.TemporaryDirectory() as folder:
        trainer, sampler = trainer_of(
            setup, arm, seed, options, folder, steps=options.steps, callbacks=[Follow()]
        )  # fmt: skip
        wait()
        trainer.train()
        if found["evaluations"][-1]["step"] < trainer.state.global_step:
            Follow().evaluate(trainer.state.global_step)
    found["done"] = trainer.state.global_step >= options.steps
    note(trainer.state.log_history)


def time_alone(options: argparse.Namespace, path: Path) -> None:
    """Seconds per update of every arm alone on the device: ``{arm: [seconds, ...]}``.

    Evaluates the initial policy first; see :func:`before_path`.

    Each arm makes four generations of two updates each; the first two, which tune kernels, are not counted.
    """
    quiet()
    setup = set_up(options)
    write_json(before_path(options), {"right": answers_of(setup)})
    seconds = {}
    for arm in options.arms:
        own = Setup(setup.tokenizer, copy.deepcopy(setup.model), setup.problems, setup.heldout, setup.rollouts)
        with tempfile.TemporaryDirectory() as folder:
            trainer, _ = trainer_of(own, arm, 0, options, folder, steps=8, callbacks=[])
            trainer.train()
        seconds[arm] = [row["update_seconds"] for row in trainer.state.log_history if "update_seconds" in row][2:]
        print(f"{arm}: {statistics.median(seconds[arm]):.3f} s per update, alone on the device", flush=True)
        del trainer, own
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    write_json(path, seconds)


def quiet() -> None:
    """Switch off progress bars and TRL's notice about its experimental module."""
    from datasets import disable_progress_bars

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    disable_progress_bars()


def write_json(path: Path, value: Any) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)
