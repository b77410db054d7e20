"""``cggr study`` on real text: what selection, ratio and gradient mode do to learning, with every control beside them.

``scratch`` trains a small Llama-type model on the source of Python's standard library, ``finetune`` goes on from the
standard run of that study with a JSON Lines file of questions and answers (GSM8K's, say), ``batch`` compares standard
training at batch 1, CGGR at batch 4 and standard training at batch 4 for the same time.

Steps are timed with nothing else running; runs then train side by side on one device, and equal time means equal steps
times measured step time. A study that was stopped goes on where it was when the same command is given again.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import _record
from cggr_train.demo import write_corpus
from cggr_train.learner import Routing
from cggr_train.log import JsonlLog, read_log
from cggr_train.settings import TrainSettings
from cggr_train.study import StudySettings, resume_study
from cggr_train.study.analysis import Outcome
from cggr_train.study.intervals import Interval
from cggr_train.study.run import RESULTS, prepare_study
from cggr_train.study.settings import STUDY

SELECTIONS = ("topk", "stratified", "sequence_aware", "random", "sampled")
GRIDS: dict[str, dict[str, Any]] = {
    "selections": {"gradients": ("kv", "exact"), "ratios": (0.25,), "selections": SELECTIONS},
    "ratios": {"gradients": ("kv", "exact"), "ratios": (0.125, 0.5), "selections": ("stratified",)},
    "all": {"gradients": ("kv", "exact"), "ratios": (0.125, 0.25, 0.5), "selections": SELECTIONS},
}
CORPUS = ("corpus.jsonl", "heldout.jsonl")


def settings(arguments: argparse.Namespace) -> StudySettings:
    """The study of one experiment."""
    shape: dict[str, Any] = {
        "vocab_size": arguments.vocab_size,
        "length": arguments.length,
        "batch_size": arguments.batch_size,
        "steps": arguments.steps,
        "eval_sequences": 64,
        "precision": "float32",
        "device": arguments.device,
    }
    shared: dict[str, Any] = {
        "seeds": arguments.seeds,
        "parallel": arguments.parallel,
        "calibration_seconds": arguments.calibration_seconds,
        "draws": 4,
    }
    if arguments.experiment == "finetune":
        if arguments.data is None or arguments.model is None:
            raise SystemExit("give the JSON Lines file with --data and the model to go on from with --model")
        train = TrainSettings(
            data=(str(arguments.data),), field=arguments.field, model=str(arguments.model), learning_rate=5e-4, **shape
        )
        return StudySettings(train=train, **GRIDS[arguments.grid], **shared, equal=("tokens",))
    corpus, heldout = (arguments.work / "corpus" / name for name in CORPUS)
    if not heldout.exists():
        write_corpus(corpus.parent, max_characters=arguments.characters)
    train = TrainSettings(
        data=(str(corpus),), heldout=(str(heldout),), config=arguments.config, tokenizer=arguments.tokenizer,
        learning_rate=2e-3, **shape,
    )  # fmt: skip
    if arguments.experiment == "scratch":
        return StudySettings(train=train, **GRIDS[arguments.grid], **shared, equal=("tokens",))
    train = dataclasses.replace(train, steps=None, seconds=arguments.seconds, batch_size=4, routing=Routing())
    return StudySettings(train=train, **shared, batch_sizes=(1,), equal=("time",))


def rows(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Every arm's figures in the form of the results; the loss at equal time leads."""
    found: dict[str, dict[str, Any]] = {}
    for arm in outcome.arms:
        name = arm.name
        last = [points[-1] for points in outcome.curves[name]]
        middle, low, high = outcome.step_seconds[name]
        losses = [
            next(p["heldout_loss"] for p in points if p["step"] == _step(outcome, name, points))
            for points in outcome.curves[name]
        ]
        found[name] = {
            **_record.summary(losses),
            "unit": "nat",
            "label": arm.label,
            "role": arm.role,
            "batch": arm.batch_size,
            "loss": {reading: _interval(by[name].loss) for reading, by in outcome.comparisons.items()},
            "less_control": {
                reading: {control: _interval(value) for control, value in by[name].against.items()}
                for reading, by in outcome.comparisons.items()
            },
            "step": {"median": middle, "spread": [low, high], "unit": "s"},
            "steps_per_second": 1 / middle,
            "steps_at_equal_time": _step(outcome, name, outcome.curves[name][0]),
            "last": [{key: point[key] for key in ("step", "tokens", "kept_tokens", "heldout_loss")} for point in last],
            "memory": {**outcome.memory[name], "unit": "B"},
            "engine": outcome.engines[name],
            "gradients": {at: by[name] for at, by in outcome.gradients.items() if name in by},
            "kept": outcome.kept.get(name, {}),
        }
    return found


def take_times(source: Path, folder: Path) -> None:
    """Put the step times of one study into another whose arms have the same shapes, unless it has its own."""
    if not any(record["event"] == "timing" for record in read_log(folder / RESULTS)):
        log = JsonlLog(folder / RESULTS)
        for record in read_log(source / RESULTS):
            if record["event"] == "timing":
                log.write(**record)


def _step(outcome: Outcome, name: str, points: list[dict[str, float]]) -> int:
    seconds = outcome.amounts["time"]
    return int(min(points[1:], key=lambda point: abs(point["seconds"] - seconds))["step"])


def _interval(value: Interval) -> dict[str, float | None]:
    return value._asdict()


def main() -> None:
    """Run or resume one experiment and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("scratch", "finetune", "batch"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the studies; goes on with what is there")
    parser.add_argument("--name", help="name of the result, instead of the experiment's")
    parser.add_argument("--results", type=Path, default=_record.RESULTS, help="folder of the result")
    parser.add_argument(
        "--grid", choices=sorted(GRIDS), default="selections", help="selections, ratios, or all of both"
    )
    parser.add_argument("--data", type=Path, help="JSON Lines file for finetune")
    parser.add_argument("--model", type=Path, help="folder of the model that finetune goes on from")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, instead of training one")
    parser.add_argument("--field", default="question,answer", help="its keys")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--characters", type=int, default=20_000_000, help="of the standard library's source")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each run of batch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int)
    parser.add_argument("--calibration-seconds", type=float, default=1.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prepare", action="store_true", help="write what the study starts from, and stop")
    parser.add_argument("--times-from", help="name of a study of the same shapes whose step times hold for this one")
    arguments = parser.parse_args()
    console = Console(width=150)
    name = arguments.name or "_".join(
        ["study", arguments.experiment, *([arguments.grid] if arguments.experiment != "batch" else [])]
    )
    folder = arguments.work / name
    if not (folder / STUDY).exists():
        prepare_study(settings(arguments), folder, console)
    if arguments.prepare:
        return
    if arguments.times_from is not None:
        take_times(arguments.work / arguments.times_from, folder)
    result = resume_study(folder, console)
    if result.outcome is None:
        raise SystemExit(result.exit_code)
    asked = StudySettings.load(folder)
    train = {name: value for name, value in dataclasses.asdict(asked.train).items() if name not in ("data", "heldout")}
    train["model"] = "the standard run of study_scratch_selections, seed 0" if train["model"] else None
    noted = {
        **{name: getattr(asked, name) for name in ("seeds", "equal", "parallel", "draws", "gradient_batches")},
        "seed": asked.train.seed,
        "train": train,
        "text": arguments.field if arguments.experiment == "finetune" else "source of Python's standard library",
        "amounts": result.outcome.amounts,
        "times_from": arguments.times_from,
        "timing": "steps alone on the device; runs side by side; equal time is steps times the step's time",
    }
    path = _record.write(
        name, rows(result.outcome), settings=noted, control="standard",
        device="cuda" if arguments.device != "cpu" else "cpu", folder=arguments.results,
    )  # fmt: skip
    console.print(f"result {path}", highlight=False)


if __name__ == "__main__":
    main()
