"""What ``cggr study`` adds to the training it measures: evaluations, averaged weights, progress, counting.

The same arm trains the same steps alternately in the bare training loop and as a run of a study. Processor time of one
thread is compared, which does not depend on a busy machine. The bar: at most 5% more.
"""

import argparse
import functools
import io
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import _record
from cggr_train.demo import write_corpus
from cggr_train.settings import TrainSettings
from cggr_train.study import StudySettings, run
from cggr_train.study.arms import Arm
from cggr_train.study.context import StudyContext
from cggr_train.study.plan import make_plan
from cggr_train.study.training import train_run

BAR = 0.05
ARMS = ("standard", "kv-0.25-stratified-gradnorm")


def prepared(folder: Path, arguments: argparse.Namespace) -> StudyContext:
    """Prepare a study, without running it."""
    corpus, heldout = write_corpus(folder / "corpus", max_characters=3_000_000)
    train = TrainSettings(
        data=(str(corpus),), heldout=(str(heldout),), config=arguments.config, vocab_size=1024, length=256,
        batch_size=8, steps=arguments.steps, learning_rate=2e-3, device="cpu",
    )  # fmt: skip
    run.prepare_study(
        StudySettings(train=train, equal=("tokens",), controls=("equal_cost",)), folder, Console(file=io.StringIO())
    )
    return StudyContext(folder, torch.device("cpu"))


def bare(context: StudyContext, arm: Arm, steps: int) -> None:
    """Train in the bare loop."""
    session = context.session(arm, 0, steps=steps, warmup_steps=1, eval_sequences=1)
    session.train(lambda loss, rate: None)


def studied(context: StudyContext, arm: Arm, steps: int) -> None:
    """Train in the same way as a run of the study, with its evaluations."""
    plan = make_plan(context.settings, list(context.arms.values()), dict.fromkeys(context.arms, 1.0))
    assert plan.points[arm.name][-1] == steps
    train_run(
        context, arm, 0, points=plan.points[arm.name], warmup_steps=plan.warmup_steps,
        eval_sequences=plan.eval_sequences, save_model=False, tell=lambda **values: None,
    )  # fmt: skip


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="nano")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=3)
    _record.add_seconds(parser)
    arguments = parser.parse_args()
    deadline = _record.deadline(arguments.seconds)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        context = prepared(Path(folder), arguments)
        rows = {}
        for name in ARMS:
            calls = {
                kind: functools.partial(call, context, context.arms[name], arguments.steps)
                for kind, call in (("bare", bare), ("studied", studied))
            }
            seconds: dict[str, list[float]] = {kind: [] for kind in calls}
            for turn in range(arguments.repeats + 1):
                if turn > 1 and _record.is_over(deadline):
                    break
                for kind, call in calls.items():
                    started = time.process_time()
                    call()
                    if turn:  # the first round is a warm-up
                        seconds[kind].append(time.process_time() - started)
            ratios = [s / b - 1 for s, b in zip(seconds["studied"], seconds["bare"], strict=True)]
            for kind, samples in seconds.items():
                rows[f"{name}, {kind}"] = _record.summary(samples) | {"unit": "s"}
            added = _record.summary(ratios)
            rows[f"{name}, studied"] |= {"added": added, "bar": BAR, "met": added["median"] <= BAR}
            print(f"{name}: {added['median']:+.1%} ({added['spread'][0]:+.1%} to {added['spread'][1]:+.1%})")
        shared = context.settings.train
        settings = {
            "seed": 0, "config": arguments.config, "steps": arguments.steps, "batch": shared.batch_size,
            "sequence": shared.length, "evaluations": context.settings.evaluations,
            "clock": "processor time, one thread",
        }  # fmt: skip
        print(_record.write("study_overhead", rows, settings=settings, control="standard, bare"))


if __name__ == "__main__":
    main()
