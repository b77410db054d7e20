"""GRPO on GSM8K with a pretrained model: reward and held-out accuracy, against rollouts and against update seconds.

``python -m benchmarks.grpo_gsm8k --model FOLDER --gsm8k FOLDER --output FOLDER --seconds 570``, on one or more CUDA
devices. Needs ``trl``. The model's folder may hold a GGUF file.

All runs start from one policy, created once (``--prepare`` does only that): the model after ``--start-steps`` steps of
fine-tuning on the answers of 1,000 training problems, so that it answers briefly and in the rewarded form. All arms are
TRL's GRPOTrainer with the same settings, prompts and seeds of the rollouts, on the other problems:

- *full update*: unchanged, gradient checkpointing off;
- *top 20%, masked*: TRL's ``top_entropy_quantile``, which excludes the other tokens from the loss;
- *top 20%, kv*: the same tokens; the others have no backward in any layer;
- *random 20%, kv*: random tokens, weighted by the inverse of their probability.

A generation is sampled by :mod:`benchmarks._rollouts` and used for two optimizer steps. The reward is 1 for the right
number after ``####``, else 0. Accuracy is that of greedy decoding on the first test problems.

Runs (an arm and a seed each) are spread over the devices, several at a time on one, all arms of a seed before the next
seed; a further seed is started while there is time for all its arms. The result is written whenever a run ends.
Finished runs are kept in ``FOLDER/runs`` and not repeated by the same command; an interrupted run starts over.

Update seconds are those of forwards and backward on the device. Before the runs, each arm makes a few updates alone on
a device: those seconds are the axis of the plot. The times of the runs themselves, which share devices, are in the
JSON.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import _record
from benchmarks._grpo_run import ARMS, time_alone, train
from benchmarks._grpo_start import policy
from benchmarks.grpo_figures import write_result

_GRACE = 20.0  # seconds that a run has to stop by itself


def run_path(options: argparse.Namespace, arm: str, seed: int) -> Path:
    """Path of a run."""
    return options.output / "runs" / f"{options.name}_{re.sub('[^a-z0-9]+', '_', arm)}_seed{seed}.json"


def alone_path(options: argparse.Namespace) -> Path:
    """Path of the seconds of updates alone on a device."""
    return options.output / "runs" / f"{options.name}_alone.json"


@dataclass
class Runs:
    """Runs processes on devices, one run each.

    Attributes:
        options: Of the command.
        command: The command of a run, without the run's own arguments.
        end: Value of :func:`time.monotonic` by which everything must end.
        running: By slot: the process, its arm and its seed.
    """

    options: argparse.Namespace
    command: list[str]
    end: float
    running: dict[int, tuple[subprocess.Popen[bytes], str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        devices = visible_devices()
        self.slots = [device for _ in range(per_device(self.options)) for device in devices]

    def start(self, device: str | None, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a process of this benchmark on a device."""
        shown = os.environ if device is None else {**os.environ, "CUDA_VISIBLE_DEVICES": device}
        return subprocess.Popen([*self.command, *arguments], env=dict(shown))

    def seeds(self, numbers: range) -> None:
        """Run all unfinished runs of these seeds, seed by seed."""
        options = self.options
        wanted = [(arm, seed) for seed in numbers for arm in options.arms]
        waiting = [(arm, seed) for arm, seed in wanted if not is_done(run_path(options, arm, seed))]
        go = options.output / "runs" / "go"
        go.unlink(missing_ok=True)
        timing = None if alone_path(options).exists() or not waiting else self.start(self.slots[0], "--alone")
        while waiting or self.running:
            if not go.exists() and (timing is None or timing.poll() is not None):
                go.parent.mkdir(parents=True, exist_ok=True)
                go.touch()
            for slot, device in enumerate(self.slots):
                self._collect(slot)
                if slot not in self.running and waiting and time.monotonic() < self.end - _GRACE:
                    # The remaining time is shared by the remaining rounds.
                    share = (self.end - time.monotonic()) / -(-len(waiting) // len(self.slots))
                    arm, seed = waiting.pop(0)
                    until = str(time.time() + share)
                    self.running[slot] = self.start(device, "--run", arm, str(seed), until), arm, seed
            if time.monotonic() > self.end + _GRACE:
                for process, _, _ in self.running.values():
                    process.terminate()
            if not self.running and time.monotonic() >= self.end - _GRACE:
                break
            time.sleep(0.5)
        if timing is not None:
            timing.wait()

    def _collect(self, slot: int) -> None:
        if slot not in self.running or self.running[slot][0].poll() is None:
            return
        process, arm, seed = self.running.pop(slot)
        if process.returncode:
            print(f"{arm}, seed {seed}: failed ({process.returncode})", flush=True)
        result(self.options)


def run_all(options: argparse.Namespace, argv: list[str]) -> None:
    """Run the requested seeds, and more while there is time."""
    end = time.monotonic() + options.seconds
    model = str(policy(options))
    shared = ["--model", model, "--per-device", str(per_device(options))]
    runs = Runs(options, [sys.executable, "-m", "benchmarks.grpo_gsm8k", *argv, *shared], end)
    done, longest = 0, 0.0
    while done < options.seeds or 1.1 * longest < end - time.monotonic():
        more = options.seeds if done == 0 else 1
        started = time.monotonic()
        runs.seeds(range(done, done + more))
        longest = max(longest, (time.monotonic() - started) / more)
        done += more
        if time.monotonic() >= end - _GRACE or longest < 5:  # seeds finished earlier do not tell how long one takes
            break


def result(options: argparse.Namespace) -> None:
    """Write the JSON and the plot of the results so far."""
    paths = sorted((options.output / "runs").glob(f"{options.name}_*_seed*.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    alone = alone_path(options)
    seconds = json.loads(alone.read_text(encoding="utf-8")) if alone.exists() else {}
    write_result(options.name, runs, alone=seconds, folder=options.output)


def visible_devices() -> list[str | None]:
    """CUDA devices as named in this process's environment, or the CPU."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count] if count else [None]


def per_device(options: argparse.Namespace) -> int:
    """Number of runs on a device at a time."""
    if options.per_device or not torch.cuda.is_available():
        return options.per_device or 1
    room = torch.cuda.get_device_properties(0).total_memory / 1e9
    return max(1, min(len(options.arms), int(room / options.gigabytes)))


def is_done(path: Path) -> bool:
    """Whether a run was finished."""
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["done"]


def waits_for(go: Path, until: float) -> Callable[[], None]:
    """A function that waits until a file exists."""

    def wait() -> None:
        while not go.exists() and time.time() < until:
            time.sleep(0.2)

    return wait


def main() -> None:
    """Run whatever is unfinished, and write the result of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a chat model; may hold a GGUF file")
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the result and of runs/")
    parser.add_argument("--name", default="grpo_gsm8k")
    parser.add_argument("--seconds", type=float, default=570.0, help="for all runs")
    parser.add_argument("--prepare", action="store_true", help="only create the policy that all runs start from")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=2, help="at least; more while there is time")
    parser.add_argument("--per-device", type=int, help="runs at a time on one device; default: as memory allows")
    parser.add_argument("--gigabytes", type=float, default=24.0, help="memory of a run, for that default")
    parser.add_argument("--start-steps", type=int, default=60, help="steps of fine-tuning on answers, before all runs")
    parser.add_argument("--least-right", type=float, default=0.05, help="stop below this share of right answers")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps")
    parser.add_argument("--rollouts", type=int, default=128, help="completions per generation; an update takes half")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--prompt", type=int, default=192, help="most tokens of a prompt; longer problems are left out")
    parser.add_argument("--completion", type=int, default=200, help="tokens at most")
    parser.add_argument("--rows", type=int, default=16, help="completions per micro-batch of TRL's own update")
    parser.add_argument("--routed-rows", type=int, default=64, help="completions per micro-batch of a routed update")
    parser.add_argument("--rate", type=float, default=5e-6, help="learning rate")
    parser.add_argument("--questions", type=int, default=384, help="held-out problems per evaluation")
    parser.add_argument("--evaluate-every", type=int, default=40, help="optimizer steps between evaluations")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--run", nargs=3, metavar=("ARM", "SEED", "UNTIL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(False)  # with it, a gradient of padded rows was NaN on an H200
    if options.run:
        arm, seed, until = options.run
        options.until = float(until)
        wait = waits_for(options.output / "runs" / "go", options.until)
        train(arm, int(seed), options, run_path(options, arm, int(seed)), wait)
    elif options.alone:
        time_alone(options, alone_path(options))
    elif options.prepare:
        policy(options)
    else:
        run_all(options, sys.argv[1:])
        result(options)


if __name__ == "__main__":
    main()
