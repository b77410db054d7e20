"""GRPO on GSM8K with a pretrained model: reward and held-out accuracy, against rollouts and against update seconds.

``python -m benchmarks.grpo_gsm8k --model FOLDER --gsm8k FOLDER --output FOLDER --seconds 480``. Needs ``trl``; the
model's folder may hold a GGUF file. Runs (an arm and a seed each) are spread over the CUDA devices, ``--per-device`` of
them at a time. A run that is over is kept in ``FOLDER/runs`` and not made again by the same command; one that was
stopped starts anew.

All arms are TRL's GRPOTrainer with the same settings, prompts and seeds of the rollouts:

- *full update*: as it comes, gradient checkpointing off;
- *top 20%, masked*: TRL's ``top_entropy_quantile``, which takes the other tokens out of the loss;
- *top 20%, kv*: the same tokens, the others without a backward in any layer;
- *random 20%, kv*: random tokens, weighted by the inverse of their probability.

A generation is sampled by :mod:`benchmarks._rollouts` and makes two optimizer steps. Two problems with their answers
stand in every prompt; the reward is 1 for the right number after ``####``, else 0. Accuracy is that of greedy decoding
on the first test problems.

Update seconds are those of forwards and backward on the device; where runs share a device, the others' work is in them.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import _record
from benchmarks.gsm8k import MARK, read_problems

CONTROL = "full update"
ARMS: dict[str, dict[str, Any]] = {
    CONTROL: {},
    "top 20%, masked": {"top_entropy_quantile": 0.2},
    "top 20%, kv": {"top_entropy_quantile": 0.2, "cggr": {}},
    "random 20%, kv": {"cggr": {"selection": "random", "min_tokens_ratio": 0.2}},
}
SHOTS = 2
_NUMBER = re.compile(rf"{MARK}\s*\$?(-?[\d,]*\.?\d+)")
_RESERVE = 25.0  # seconds for the last evaluation and writing


@dataclass(frozen=True)
class Task:
    """Problems as prompts, and their answers."""

    prompts: list[str]
    answers: list[str]


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for a completion whose last number after the mark is the answer, else 0."""
    return [float(number_of(text) == float(wanted)) for text, wanted in zip(completions, answer, strict=True)]


def number_of(text: str) -> float | None:
    """The last number after the mark."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def examples(folder: Path) -> list[dict[str, str]]:
    """Two short training problems, which every prompt shows with their answers; none of them is trained on."""
    first = read_problems(folder / "train.jsonl")[:100]
    return sorted(first, key=lambda problem: len(problem["question"] + problem["answer"]))[:SHOTS]


def task(path: Path, shown: list[dict[str, str]], tokenizer: Any, longest: int) -> Task:
    """The problems of a file whose prompts have at most so many tokens.

    Args:
        path: Problems.
        shown: Examples that stand before each of them, as turns of a conversation.
        tokenizer: With a chat template.
        longest: Tokens.
    """
    before = []
    for problem in shown:
        answer = re.sub("<<.*?>>", "", problem["answer"])  # GSM8K's notes for a calculator
        before += [{"role": "user", "content": problem["question"]}, {"role": "assistant", "content": answer}]
    prompts, answers = [], []
    for problem in read_problems(path):
        number = number_of(problem["answer"])
        if problem in shown or number is None:
            continue
        turns = [*before, {"role": "user", "content": problem["question"]}]
        prompts.append(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        answers.append(str(number))
    sizes = map(len, tokenizer(prompts, add_special_tokens=False)["input_ids"])
    kept = [number for number, size in enumerate(sizes) if size <= longest]
    return Task([prompts[number] for number in kept], [answers[number] for number in kept])


def with_end_of_turn(tokenizer: Any) -> Any:
    """The tokenizer, its end-of-sequence token that which ends an answer; a GGUF file may name another."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(encode(tokenizer, text.rpartition("answer")[2])[0])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt that has its special tokens already."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]


def train(arm: str, seed: int, options: argparse.Namespace, path: Path) -> None:
    """One run, until ``options.until`` (seconds since the epoch); ``path`` is written at every evaluation."""
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback, TrainerCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer

    from benchmarks._rollouts import Rollouts
    from cggr_core.stopwatch import Stopwatch
    from cggr_train import CGGRConfig, CGGRMixin
    from cggr_train.presets import load_model
    from cggr_train.tokenizer import load_tokenizer

    class Routed(CGGRMixin, GRPOTrainer):
        """The update on the tokens that it is about."""

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

    began = time.monotonic()
    end = options.until - _RESERVE
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    disable_progress_bars()
    set_seed(seed)
    cuda = torch.cuda.is_available()
    settings = dict(ARMS[arm])
    cggr = settings.pop("cggr", None)
    tokenizer = with_end_of_turn(load_tokenizer(str(options.model)))
    model = load_model(str(options.model)).to("cuda" if cuda else "cpu")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    shown = examples(options.gsm8k)
    problems, heldout = (
        task(options.gsm8k / f"{name}.jsonl", shown, tokenizer, options.prompt) for name in ("train", "test")
    )
    asked = [encode(tokenizer, prompt) for prompt in heldout.prompts[: options.questions]]
    rollouts = Rollouts(model, tokenizer, rows=options.rollouts, prompt=options.prompt, new=options.completion)
    spent = {"rollouts": 0.0, "evaluations": 0.0}
    print(f"{arm}, seed {seed}: model and data after {time.monotonic() - began:.0f} s", flush=True)
    found: dict[str, Any] = {"arm": arm, "seed": seed, "steps": [], "evaluations": [], "done": False}

    def sample(prompts: list[str], trainer: Any) -> dict[str, Any]:
        started = time.monotonic()
        rollouts.load(trainer.accelerator.unwrap_model(trainer.model))
        ids = [encode(tokenizer, prompt) for prompt in prompts]
        draw = 1_000_003 * seed + trainer.state.global_step
        completions = rollouts(ids, temperature=1.0, seed=draw)
        spent["rollouts"] += time.monotonic() - started
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}

    class Follow(TrainerCallback):
        """Evaluates, notes, and ends the run in time."""

        def evaluate(self, step: int) -> None:
            """Greedy answers to the held-out problems."""
            started = time.monotonic()
            rollouts.load(trainer.accelerator.unwrap_model(trainer.model))
            texts = tokenizer.batch_decode(rollouts(asked, temperature=0.0, seed=0), skip_special_tokens=True)
            accuracy = statistics.fmean(right(texts, heldout.answers[: len(texts)]))
            spent["evaluations"] += time.monotonic() - started
            found["evaluations"].append({"step": step, "accuracy": accuracy})
            note(trainer.state.log_history)
            print(f"{arm}, seed {seed}, step {step}: {accuracy:.1%} after {time.monotonic() - began:.0f} s", flush=True)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.evaluate(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step >= options.steps or time.time() > end

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % options.evaluate_every == 0 and found["evaluations"][-1]["step"] < state.global_step:
                self.evaluate(state.global_step)

    def note(history: list[dict[str, Any]]) -> None:
        names = ("reward", "update_seconds", "keep_ratio", "completions/mean_length", "frac_reward_zero_std", "entropy")
        found["steps"] = [
            {"step": row["step"], **{name: row[name] for name in names if name in row}}
            for row in history
            if "loss" in row
        ]
        found["spent"] = {"all": time.monotonic() - began, **spent}
        write_json(path, found)

    micro = options.rows if cggr is None else options.routed_rows
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            folder, bf16=cuda, use_cpu=not cuda, learning_rate=options.rate, seed=seed, report_to="none",
            lr_scheduler_type="constant_with_warmup", warmup_steps=5, max_steps=options.steps, logging_steps=1,
            per_device_train_batch_size=micro, gradient_accumulation_steps=options.rollouts // 2 // micro,
            steps_per_generation=options.rollouts // micro, num_generations=options.group, save_strategy="no",
            max_completion_length=options.completion, gradient_checkpointing=False, disable_tqdm=True, **settings,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": problems.prompts, "answer": problems.answers})
        given = {
            "model": model, "args": arguments, "train_dataset": data, "processing_class": tokenizer,
            "reward_funcs": right, "rollout_func": sample, "callbacks": [Follow()],
        }  # fmt: skip
        trainer: Any = Plain(**given) if cggr is None else Routed(**given, cggr=CGGRConfig(**cggr))
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        if found["evaluations"][-1]["step"] < trainer.state.global_step:
            Follow().evaluate(trainer.state.global_step)
    found["done"] = True
    note(trainer.state.log_history)


def write_json(path: Path, value: Any) -> None:
    """Write a file that is never seen half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    temporary.replace(path)


def run_path(options: argparse.Namespace, arm: str, seed: int) -> Path:
    """Where a run is kept."""
    return options.output / "runs" / f"{options.name}_{re.sub('[^a-z0-9]+', '_', arm)}_seed{seed}.json"


def run_all(options: argparse.Namespace, argv: list[str]) -> None:
    """Every run that is not over, in processes of their own; each gets its share of the time."""
    end = time.monotonic() + options.seconds
    model = str(as_safetensors(options.model, options.output / "models"))
    wanted = [(arm, seed) for seed in range(options.seeds) for arm in options.arms]
    waiting = [(arm, seed) for arm, seed in wanted if not is_done(run_path(options, arm, seed))]
    devices = visible_devices()
    slots = [device for _ in range(options.per_device) for device in devices]
    rounds = -(-len(waiting) // len(slots))
    share = (end - time.monotonic()) / max(rounds, 1)
    running: dict[int, tuple[subprocess.Popen[bytes], str, int]] = {}
    while waiting or running:
        for slot, device in enumerate(slots):
            if slot in running and running[slot][0].poll() is not None:
                process, arm, seed = running.pop(slot)
                if process.returncode:
                    print(f"{arm}, seed {seed}: failed ({process.returncode})", flush=True)
            if slot not in running and waiting and time.monotonic() < end:
                arm, seed = waiting.pop(0)
                until = str(time.time() + min(share, end - time.monotonic()))
                command = [sys.executable, "-m", "benchmarks.grpo_gsm8k", *argv, "--model", model]
                command += ["--run", arm, str(seed), until]
                shown = os.environ if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
                running[slot] = subprocess.Popen(command, env=dict(shown)), arm, seed
        if time.monotonic() > end + 60:
            for process, _, _ in running.values():
                process.terminate()
        if not running and time.monotonic() >= end:
            break
        time.sleep(0.5)


def as_safetensors(model: Path, folder: Path) -> Path:
    """Where the model stands in a form that loads in seconds: a GGUF file is read once, not by every run."""
    from cggr_train.presets import load_model
    from cggr_train.tokenizer import load_tokenizer

    if (model / "config.json").exists():
        return model
    written = folder / model.name
    if not written.exists():
        temporary = folder / f"{model.name}.part"
        load_model(str(model)).save_pretrained(temporary)
        load_tokenizer(str(model)).save_pretrained(temporary)
        temporary.rename(written)
    return written


def visible_devices() -> list[str | None]:
    """CUDA devices by the names that this process was given, or the CPU."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count] if count else [None]


def is_done(path: Path) -> bool:
    """Whether a run was finished."""
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["done"]


def write_result(options: argparse.Namespace) -> None:
    """The JSON and the plot of all runs that are there."""
    rows: dict[str, dict[str, Any]] = {}
    for arm in options.arms:
        paths = [run_path(options, arm, seed) for seed in range(options.seeds)]
        runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
        runs = [run for run in runs if len(run["evaluations"]) > 1]
        if not runs:
            continue
        seconds = [statistics.median(step["update_seconds"] for step in run["steps"]) for run in runs]
        rewards = [[step["reward"] for step in run["steps"] if "reward" in step] for run in runs]
        rows[arm] = {
            **_record.summary([run["evaluations"][-1]["accuracy"] for run in runs]),
            "unit": "accuracy",
            "update_seconds": _record.summary(seconds),
            "reward": _record.summary([statistics.fmean(run[-10:]) for run in rewards]),
            "runs": runs,
        }
    if not rows:
        print("no run has come to its second evaluation")
        return
    settings = {
        "seed": 0, "model": options.model.name, "arms": {arm: ARMS[arm] for arm in rows},
        **{
            name: getattr(options, name)
            for name in (
                "seeds", "per_device", "rollouts", "group", "prompt", "completion", "rows", "routed_rows", "rate",
                "steps", "questions",
            )
        },
    }  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    control = CONTROL if CONTROL in rows else next(iter(rows))
    path = _record.write(options.name, rows, settings=settings, control=control, device=device, folder=options.output)
    draw(_record.load(options.name, folder=options.output), path.with_suffix(".png"))
    report(rows)


def report(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'':24} {'runs':>4} {'steps':>6} {'reward':>7} {'accuracy, before and after':>27} {'s per update':>13}")
    for arm, row in rows.items():
        steps = min(len(run["steps"]) for run in row["runs"])
        before = statistics.fmean(run["evaluations"][0]["accuracy"] for run in row["runs"])
        accuracy = f"{before:13.1%} {row['median']:13.1%}"
        numbers = f"{row['samples']:4} {steps:6} {row['reward']['median']:7.3f} {accuracy}"
        print(f"{arm:24} {numbers} {row['update_seconds']['median']:13.3f}")


def draw(result: dict[str, Any], path: Path) -> None:
    """Reward and accuracy against rollouts and against update seconds; a line per run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6.4), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row", sharex="col")
    per_step = result["settings"]["rollouts"] // 2
    colours = dict(zip(ARMS, ("0.45", "#e9a23b", "#2a6f97", "#7b4ea3"), strict=True))
    for arm, row in result["rows"].items():
        for number, run in enumerate(row["runs"]):
            look = {"color": colours[arm], "label": arm if number == 0 else None, "linewidth": 1.3}
            # The seconds of an update by its run's median, so that single steps that waited do not shift the rest.
            second = statistics.median(step["update_seconds"] for step in run["steps"])
            rewarded = [step for step in run["steps"] if "reward" in step]
            steps = [step["step"] for step in rewarded]
            smooth = running_mean([step["reward"] for step in rewarded], 5)
            evaluated = [one["step"] for one in run["evaluations"]]
            accuracy = [one["accuracy"] for one in run["evaluations"]]
            for column, factor in enumerate((per_step, second)):
                panels[0][column].plot([step * factor for step in steps], smooth, **look)
                panels[1][column].plot([step * factor for step in evaluated], accuracy, marker="o", ms=3, **look)
    panels[0][0].set_ylabel("reward (mean of five generations)")
    panels[1][0].set_ylabel("held-out accuracy")
    panels[1][0].set_xlabel("rollouts")
    panels[1][1].set_xlabel("seconds of updates")
    panels[0][0].legend(frameon=False, fontsize=8)
    for axes in panels.flat:
        axes.spines[["top", "right"]].set_visible(False)
    settings = result["settings"]
    figure.suptitle(f"GRPO on GSM8K, {settings['model']}: {result['environment']['device']}", fontsize=10)
    figure.savefig(path, dpi=150)


def running_mean(values: list[float], width: int) -> list[float]:
    """Means of the last ``width`` values."""
    return [statistics.fmean(values[max(0, at - width + 1) : at + 1]) for at in range(len(values))]


def main() -> None:
    """Run what is not over, and write the result of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a chat model; may hold a GGUF file")
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the result and of runs/")
    parser.add_argument("--name", default="grpo_gsm8k")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all runs")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--per-device", type=int, default=2, help="runs at a time on one device")
    parser.add_argument("--steps", type=int, default=160, help="optimizer steps at most")
    parser.add_argument("--rollouts", type=int, default=256, help="of a generation; half of them make an update")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--prompt", type=int, default=384, help="tokens at most; longer problems are left out")
    parser.add_argument("--completion", type=int, default=160, help="tokens at most")
    parser.add_argument("--rows", type=int, default=16, help="of a micro-batch of TRL's own update")
    parser.add_argument("--routed-rows", type=int, default=128, help="of a micro-batch of a routed update")
    parser.add_argument("--rate", type=float, default=3e-6, help="learning rate")
    parser.add_argument("--questions", type=int, default=512, help="held-out problems of an evaluation")
    parser.add_argument("--evaluate-every", type=int, default=20, help="optimizer steps between evaluations")
    parser.add_argument("--run", nargs=3, metavar=("ARM", "SEED", "UNTIL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        arm, seed, until = options.run
        options.until = float(until)
        train(arm, int(seed), options, run_path(options, arm, int(seed)))
        return
    run_all(options, sys.argv[1:])
    write_result(options)


if __name__ == "__main__":
    main()
