"""``cggr study`` on real text: what selection, ratio and gradient mode do to learning, against every control.

``scratch`` trains a small Llama-type model on the source of Python's standard library (and of installed packages, if
named), ``finetune`` continues from the standard run of that study with a JSON Lines file of questions and answers
(GSM8K's, say), ``batch`` compares standard training at batch 1, CGGR at batch 4 and standard training at batch 4 for
the same time. With ``--rates``, no study is run: only the standard arm is, once with each of these learning rates at a
separate seed, to choose the rate for all arms.

Steps are timed with nothing else running; runs then train in parallel on one device, and equal time means an equal
product of steps and measured step time. The same command resumes an interrupted study.
"""

import argparse
import dataclasses
import importlib.util
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import _record
from cggr_train.demo import write_corpus
from cggr_train.device import pick_device
from cggr_train.learner import Routing
from cggr_train.log import JsonlLog, read_log
from cggr_train.settings import TrainSettings
from cggr_train.study import StudySettings, resume_study
from cggr_train.study.analysis import Outcome
from cggr_train.study.arms import plan_arms, save_arms
from cggr_train.study.context import WARMUP, StudyContext
from cggr_train.study.intervals import Interval
from cggr_train.study.run import prepare_study
from cggr_train.study.settings import STUDY
from cggr_train.study.stages import RESULTS
from cggr_train.study.training import train_run

SELECTIONS = ("topk", "stratified", "sequence_aware", "random", "sampled")
GRIDS: dict[str, dict[str, Any]] = {
    "selections": {"gradients": ("kv", "exact"), "ratios": (0.25,), "selections": SELECTIONS},
    "ratios": {"gradients": ("kv", "exact"), "ratios": (0.125, 0.5), "selections": ("stratified",)},
    "all": {"gradients": ("kv", "exact"), "ratios": (0.125, 0.25, 0.5), "selections": SELECTIONS},
    "routers": {
        "gradients": ("kv",),
        "ratios": (0.25,),
        "selections": ("stratified",),
        "routers": ("full_depth", "truncated", "learned", "remembered"),
    },
    "cheap": {
        "gradients": ("kv",),
        "ratios": (0.25, 0.5),
        "selections": ("sampled",),
        "routers": ("truncated",),
    },
}
RATES_SEED = 1000
"""Not a seed of any study: the rate is not chosen on the reported figures."""
CORPUS = ("corpus.jsonl", "heldout.jsonl")
SOURCES = "sources.txt"
"""Stored beside the corpus: its origin, so that the result can state it wherever the study runs."""


def settings(arguments: argparse.Namespace) -> StudySettings:
    """The study of one experiment."""
    shape: dict[str, Any] = {
        "vocab_size": arguments.vocab_size,
        "length": arguments.length,
        "batch_size": arguments.batch_size,
        "steps": arguments.steps,
        "eval_sequences": 64,
        "device": arguments.device,
        "precision": arguments.precision,
        "cuda_graph": arguments.cuda_graph,
        "learning_rate": arguments.learning_rate,
    }
    shared: dict[str, Any] = {
        "seeds": arguments.seeds,
        "parallel": arguments.parallel,
        "evaluations": arguments.evaluations,
        "calibration_seconds": arguments.calibration_seconds,
        "draws": 4,
    }
    if arguments.experiment == "finetune":
        if arguments.data is None or arguments.model is None:
            raise SystemExit(
                "finetune needs --data, a JSON Lines file, and --model, the folder of the model to start from"
            )
        train = TrainSettings(
            data=(str(arguments.data),), heldout=(str(arguments.heldout),) if arguments.heldout else (),
            field=arguments.field, model=str(arguments.model), **shape,
        )  # fmt: skip
        return StudySettings(train=train, **GRIDS[arguments.grid], **shared, equal=tuple(arguments.equal))
    corpus, heldout = (arguments.work / "corpus" / name for name in CORPUS)
    if not heldout.exists():
        specs = [importlib.util.find_spec(name) for name in arguments.packages]
        roots = [Path(spec.origin).parent for spec in specs if spec is not None and spec.origin is not None]
        write_corpus(corpus.parent, max_characters=arguments.characters, roots=roots)
        (corpus.parent / SOURCES).write_text(_sources(arguments.packages) + "\n", encoding="utf-8")
    train = TrainSettings(
        data=(str(corpus),), heldout=(str(heldout),), config=arguments.config, tokenizer=arguments.tokenizer, **shape
    )
    if arguments.experiment == "scratch":
        return StudySettings(train=train, **GRIDS[arguments.grid], **shared, equal=tuple(arguments.equal))
    train = dataclasses.replace(train, steps=None, seconds=arguments.seconds, batch_size=4, routing=Routing())
    return StudySettings(train=train, **shared, batch_sizes=(1,), equal=("time",))


def rows(outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Every arm's figures in the form of the results; the loss at equal time comes first, if there is one."""
    found: dict[str, dict[str, Any]] = {}
    for arm in outcome.arms:
        name = arm.name
        middle, low, high = outcome.step_seconds[name]
        found[name] = {
            **_equal_time(outcome, name),
            "unit": "nat",
            "label": arm.label,
            "role": arm.role,
            "batch": arm.batch_size,
            "loss": {reading: _interval(by[name].loss) for reading, by in outcome.comparisons.items() if name in by},
            "less_control": {
                reading: {control: _interval(value) for control, value in by[name].against.items()}
                for reading, by in outcome.comparisons.items()
                if name in by
            },
            "step": {"median": middle, "spread": [low, high], "unit": "s"},
            "steps_per_second": 1 / middle,
            "last": [
                {key: points[-1][key] for key in ("step", "tokens", "kept_tokens", "heldout_loss")}
                for points in outcome.curves[name]
            ],
            "memory": {**outcome.memory[name], "unit": "B"},
            "engine": outcome.engines[name],
            "gradients": {at: by[name] for at, by in outcome.gradients.items() if name in by},
            "kept": outcome.kept.get(name, {}),
        }
    return found


def _equal_time(outcome: Outcome, name: str) -> dict[str, Any]:
    """Loss over seeds in the same time; for an arm that diverged, where it did."""
    if name in outcome.diverged:
        return {"diverged": outcome.diverged[name]}
    curves = outcome.curves[name]
    step = _step(outcome, name, curves[0])
    losses = [next(point["heldout_loss"] for point in points if point["step"] == step) for points in curves]
    return {**_record.summary(losses), "steps_at_equal_time": step}


def add_routers(folder: Path, routers: list[str]) -> None:
    """Add arms to a prepared study: ``kv`` at keep ratio 0.25 with routers other than full depth."""
    context = StudyContext(folder, pick_device("cpu"))
    asked = context.settings
    more = plan_arms(
        asked.train.routing, gradients=["kv"], ratios=[0.25], selections=["stratified"], scorings=asked.scorings,
        batch_size=asked.train.batch_size, routers=routers, num_layers=context.model(0).config.num_hidden_layers,
    )  # fmt: skip
    save_arms(folder, [*context.arms.values(), *(arm for arm in more if arm.name not in context.arms)])


def try_rates(folder: Path, rates: list[float], results: Path, name: str, device: str) -> None:
    """Train the standard arm of a prepared study with each learning rate, and write the results."""
    context = StudyContext(folder, pick_device(device))
    asked, arm = context.settings, next(iter(context.arms.values()))
    steps = asked.train.steps or 1
    found: dict[str, dict[str, Any]] = {}
    for rate in rates:
        context.settings = dataclasses.replace(asked, train=dataclasses.replace(asked.train, learning_rate=rate))
        run = train_run(
            context, arm, RATES_SEED, points=[steps], warmup_steps=WARMUP * steps, eval_sequences=64, save_model=False,
            tell=lambda **values: None,
        )  # fmt: skip
        assert run is not None  # nothing stops it
        loss = run["points"][-1]["heldout_loss"]
        found[f"{rate:g}"] = {**_record.summary([loss]), "unit": "nat", "train_seconds": run["train_seconds"]}
        print(f"learning rate {rate:g}: {loss:.4f} in {run['train_seconds']:.1f} s", flush=True)
        noted = {"seed": RATES_SEED, "steps": steps, "batch": arm.batch_size, "sequence": asked.train.length}
        _record.write(name, found, settings=noted, control=f"{rates[0]:g}", device=context.device, folder=results)


def take_times(source: Path, folder: Path) -> None:
    """Copy the step times of one study to another whose arms have the same shapes, unless it has its own."""
    if not any(record["event"] == "timing" for record in read_log(folder / RESULTS)):
        log = JsonlLog(folder / RESULTS)
        for record in read_log(source / RESULTS):
            if record["event"] == "timing":
                log.write(**record)


def _step(outcome: Outcome, name: str, points: list[dict[str, float]]) -> int:
    seconds = outcome.amounts["time"]
    return int(min(points[1:], key=lambda point: abs(point["seconds"] - seconds))["step"])


def _sources(packages: list[str]) -> str:
    python = f"source of Python {platform.python_version()}'s standard library"
    return ", ".join([python, *(f"{name} {version(name)}" for name in packages)])


def _interval(value: Interval) -> dict[str, float | None]:
    return value._asdict()


def main() -> None:
    """Run or resume one experiment and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=("scratch", "finetune", "batch"))
    parser.add_argument("--work", type=Path, required=True, help="folder of the studies; continues existing ones")
    parser.add_argument("--name", help="name of the result, instead of the experiment's")
    parser.add_argument("--results", type=Path, default=_record.RESULTS, help="folder of the result")
    parser.add_argument(
        "--grid", choices=sorted(GRIDS), default="selections", help="selections, ratios, or all of both"
    )
    parser.add_argument("--equal", nargs="+", choices=("tokens", "time"), default=["tokens"], help="what runs reach")
    parser.add_argument("--data", type=Path, help="JSON Lines file for finetune")
    parser.add_argument("--heldout", type=Path, help="held-out JSON Lines file; default: a share of the first")
    parser.add_argument("--packages", nargs="*", default=[], help="installed packages whose source is added")
    parser.add_argument("--routers", nargs="*", default=[], help="add arms: kv 0.25, stratified, with these routers")
    parser.add_argument("--rates", type=float, nargs="*", help="only try these learning rates on the standard arm")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--cuda-graph", action="store_true")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--evaluations", type=int, default=8, help="points of each curve")
    parser.add_argument("--model", type=Path, help="folder of the model that finetune starts from")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, instead of training one")
    parser.add_argument("--field", default="question,answer", help="its keys")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--characters", type=int, default=20_000_000, help="of each library's source, at most")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each run of batch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int)
    parser.add_argument("--calibration-seconds", type=float, default=1.0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prepare", action="store_true", help="prepare the study, and stop")
    parser.add_argument("--times-from", help="name of a study of the same shapes whose step times to reuse")
    arguments = parser.parse_args()
    console = Console(width=150)
    name = arguments.name or "_".join(
        ["study", arguments.experiment, *([arguments.grid] if arguments.experiment != "batch" else [])]
    )
    folder = arguments.work / name
    if not (folder / STUDY).exists():
        prepare_study(settings(arguments), folder, console)
        if arguments.routers:
            add_routers(folder, arguments.routers)
    if arguments.rates:
        try_rates(folder, arguments.rates, arguments.results, f"{name}_rates", arguments.device)
    if arguments.prepare or arguments.rates:
        return
    if arguments.times_from is not None:
        take_times(arguments.work / arguments.times_from, folder)
    result = resume_study(folder, console)
    if result.outcome is None:
        raise SystemExit(result.exit_code)
    asked = StudySettings.load(folder)
    train = {name: value for name, value in dataclasses.asdict(asked.train).items() if name not in ("data", "heldout")}
    train["model"] = f"the standard run of {Path(train['model']).parts[-4]}, seed 0" if train["model"] else None
    train["tokenizer"] = "a folder's" if train["tokenizer"] else None
    sources = arguments.work / "corpus" / SOURCES
    noted = {
        **{name: getattr(asked, name) for name in ("seeds", "equal", "parallel", "draws", "gradient_batches")},
        "seed": asked.train.seed,
        "train": train,
        "text": arguments.field if arguments.experiment == "finetune" else sources.read_text(encoding="utf-8").strip(),
        "amounts": result.outcome.amounts,
        "times_from": arguments.times_from,
        "timing": "steps are timed alone on the device; runs share it; equal time is steps times the step's time",
    }
    path = _record.write(
        name, rows(result.outcome), settings=noted, control="standard",
        device=pick_device(arguments.device), folder=arguments.results,
    )  # fmt: skip
    console.print(f"result {path}", highlight=False)


if __name__ == "__main__":
    main()
