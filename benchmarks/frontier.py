"""What someone who fine-tunes a pretrained model weighs: seconds, gigabytes, and how many problems it then solves.

Every arm of a setting trains the same model on GSM8K for the time that the standard step takes for the epochs asked
for, each with the learning rate that suits it, and answers all test problems by greedy decoding.

``answers``   a question and its answer, which alone is supervised
``context``   the same behind other questions, 2,048 tokens, of which about 6% are supervised
``batches``   the standard step at batch 1 and at batch 4 against routed steps at batch 4, for ``--seconds``

The controls are the standard step with gradient checkpointing, at the batch of equal cost, and with as many sequences
at a time as the routed step's memory has room for; random tokens at the same ratio, scattered and in stretches of 32;
and the exact gradient of sampled ones. A run that was stopped goes on when the same command is given again; after
``--stop-after`` it stops by itself, and reports on the seeds that all arms have done.
"""

import argparse
import dataclasses
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import _record
from benchmarks._frontier_trials import draw_trials, write_trials
from benchmarks.gsm8k import MARK, among_others, read_problems, write_problems
from benchmarks.study import rows
from cggr_train.device import pick_device
from cggr_train.log import read_log
from cggr_train.option_checks import parse_bytes
from cggr_train.report.plots import draw_frontier
from cggr_train.report.verdict import verdict
from cggr_train.settings import TrainSettings
from cggr_train.study import StudySettings, resume_study
from cggr_train.study.analysis import Outcome
from cggr_train.study.arms import CONTROLS, Arm, load_arms, save_arms
from cggr_train.study.run import prepare_study
from cggr_train.study.settings import STUDY
from cggr_train.study.stages import RESULTS
from cggr_train.tokenizer import load_tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "answers": {"length": 512, "batch_size": 32},
    "context": {"length": 2048, "batch_size": 16},
    "batches": {"length": 512, "batch_size": 4},
}
STRETCH = 32
"""Neighbouring tokens that are chosen together, in the arm that does so."""


def data_files(setting: str, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """What is trained on and what is held out, written once into the work folder."""
    train, test = (read_problems(arguments.gsm8k / f"{name}.jsonl") for name in ("train", "test"))
    if arguments.problems is not None:
        train = train[: arguments.problems]
    folder, length = arguments.work / "data" / f"answers_{len(train)}", arguments.length or SHAPES[setting]["length"]
    if setting == "context":
        folder = folder.with_name(f"context_{arguments.model.name}_{length}_{len(train)}")
    if setting == "context" and not (folder / "test.jsonl").exists():
        tokenizer = load_tokenizer(str(arguments.model))
        # What stands before a test problem is of the training problems: no test problem helps with another.
        test = among_others(test, train, tokenizer, length=length, seed=1)
        train = among_others(train, train, tokenizer, length=length, seed=0)
    return write_problems(folder / "train.jsonl", train), write_problems(folder / "test.jsonl", test)


def settings(setting: str, arguments: argparse.Namespace) -> StudySettings:
    """The study of one setting."""
    data, heldout = data_files(setting, arguments)
    shape = SHAPES[setting]
    length, batch_size = arguments.length or shape["length"], arguments.batch_size or shape["batch_size"]
    problems = len(data.read_text(encoding="utf-8").splitlines())
    steps = arguments.steps or max(1, round(arguments.epochs * problems / batch_size))
    steps = None if arguments.seconds else steps
    train = TrainSettings(
        data=(str(data),), heldout=(str(heldout),), field="question", answer="answer", model=str(arguments.model),
        length=length, batch_size=batch_size, steps=steps, seconds=arguments.seconds, weight_decay=0.01,
        learning_rate=arguments.rates[0], eval_sequences=arguments.eval_sequences, device=arguments.device,
    )  # fmt: skip
    return StudySettings(
        train=train,
        gradients=("kv",) if setting == "batches" else ("kv", "exact"),
        ratios=(arguments.ratio,),
        selections=("supervised", "stratified", "sampled"),
        batch_sizes=(1,) if setting == "batches" else (),
        seeds=arguments.seeds,
        equal=("time",),
        evaluations=arguments.evaluations,
        draws=0,
        parallel=arguments.parallel,
        calibration_seconds=arguments.calibration_seconds,
        controls=CONTROLS,
        memory_limit=parse_bytes("--memory-limit", arguments.memory_limit) if arguments.memory_limit else None,
        rates=tuple(arguments.rates) if len(arguments.rates) > 1 else (),
        rate_share=arguments.rate_share,
        accuracy=True,
        accuracy_readings=("tokens",) if arguments.answers_of else ("time", "tokens"),
        accuracy_of=tuple(arguments.answers_of),
        timing_turns=arguments.timing_turns,
        answer_after=MARK,
        questions=arguments.questions,
    )


def compared(arms: Sequence[Arm], ratio: float, without: Sequence[str] = ()) -> list[Arm]:
    """The arms to run: of all that were planned, those that tell something, and stretches beside scattered tokens."""
    planned = {arm.name: arm for arm in arms}
    routed = [f"kv-{ratio:g}-random", "kv-supervised", f"kv-{ratio:g}-stratified-gradnorm",
              f"kv-{ratio:g}-sampled-gradnorm", f"exact-{ratio:g}-sampled-gradnorm"]  # fmt: skip
    equal = planned["kv-supervised"].equal_cost
    wanted = {"standard", "standard-checkpointed", "standard-equal-memory", equal, *routed}
    found = [
        dataclasses.replace(
            arm,
            equal_cost=arm.equal_cost if arm.equal_cost in wanted else equal,
            random=arm.random if arm.random in wanted else f"kv-{ratio:g}-random" if arm.random else None,
        )
        for arm in arms
        if arm.name in wanted or arm.role == "batch"
    ]
    scattered = next(arm for arm in found if arm.name == f"kv-{ratio:g}-random")
    stretches = dataclasses.replace(
        scattered,
        name=f"{scattered.name}-stretch{STRETCH}",
        label=f"{scattered.label}, stretches of {STRETCH}",
        role="asked",
        random=scattered.name,
        routing=dataclasses.replace(scattered.routing, block_size=STRETCH),
    )
    place = found.index(scattered) + 1
    return [arm for arm in (*found[:place], stretches, *found[place:]) if arm.name not in without]


def stop_by_itself(seconds: float) -> None:
    """Ask this process to stop, as the study does cleanly, after so many seconds."""
    signal.signal(signal.SIGTERM, lambda number, frame: None)  # while a report is written there is nothing to stop
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


def run(folder: Path, asked: StudySettings, console: Console) -> tuple[Outcome, int] | None:
    """Run or resume a study, and report on the seeds that were done by all arms when it was stopped.

    Returns:
        The outcome and how many seeds it holds; None where not one was done.
    """
    asked.save(folder)  # an earlier run may have reported on fewer seeds
    result = resume_study(folder, console)
    if result.outcome is not None:
        return result.outcome, asked.seeds
    records = read_log(folder / RESULTS)
    names = {record["arm"] for record in records if record["event"] == "rate"} or {
        record["arm"] for record in records if record["event"] == "timing"
    }
    done = {(record["arm"], record["seed"]) for record in records if record["event"] == "run"}
    first = asked.train.seed
    whole = 0
    while whole < asked.seeds and {(name, first + whole) for name in names} <= done:
        whole += 1
    console.print(f"stopped with {len(done)} runs done, {whole} of {asked.seeds} seeds by all arms", highlight=False)
    if not whole:
        return None
    dataclasses.replace(asked, seeds=whole).save(folder)
    result = resume_study(folder, console)
    asked.save(folder)
    return None if result.outcome is None else (result.outcome, whole)


def share_of_time(curve: Sequence[dict[str, float]], loss: float, seconds: float) -> float | None:
    """How long a curve takes to come down to a loss, between its points in a straight line, as a share of ``seconds``.

    Example:
        >>> points = [{"seconds": 0.0, "heldout_loss": 3.0}, {"seconds": 4.0, "heldout_loss": 1.0}]
        >>> share_of_time(points, 2.0, 8.0), share_of_time(points, 0.5, 8.0)
        (0.25, None)
    """
    before = None
    for point in curve:
        if point["heldout_loss"] <= loss:
            if before is None:
                return 0.0
            part = (before["heldout_loss"] - loss) / (before["heldout_loss"] - point["heldout_loss"])
            return (before["seconds"] + part * (point["seconds"] - before["seconds"])) / seconds
        before = point
    return None


def reached(outcome: Outcome, name: str, control: str) -> list[float | None]:
    """Of each seed, the share of the control's time after which an arm has the loss that the control ends with."""
    if control not in outcome.losses["time"] or name not in outcome.losses["time"]:
        return []
    ends = [points[-1] for points in outcome.curves[control]]
    return [
        share_of_time(curve, end["heldout_loss"], end["seconds"])
        for curve, end in zip(outcome.curves[name], ends, strict=True)
    ]


def write_result(outcome: Outcome, asked: StudySettings, arguments: argparse.Namespace, name: str) -> Path:
    """The JSON and the plot of one setting."""
    found = rows(outcome)
    for arm in outcome.arms:
        found[arm.name] |= {
            "accuracy": outcome.accuracy.get(arm.name),
            "accuracy_after_equal_tokens": outcome.accuracy_after_tokens.get(arm.name),
            "share_of_the_time_of": {
                control: shares
                for control in ("standard", "standard-checkpointed")
                if (shares := reached(outcome, arm.name, control))
            },
            "learning_rate": arm.learning_rate or asked.train.learning_rate,
            "micro_batch": arm.forward_size,
            "checkpointing": arm.checkpointing,
        }
    train = dataclasses.asdict(asked.train)
    noted = {
        **{key: value for key, value in train.items() if key not in ("data", "heldout", "tokenizer")},
        "model": arguments.model.name,
        **{
            key: getattr(asked, key)
            for key in ("seeds", "memory_limit", "rates", "rate_share", "questions", "parallel")
        },
        "seeds_done": outcome.seeds,
        "left_out": outcome.left_out,
        "amounts": outcome.amounts,
        "verdict": verdict(outcome)[0],
    }
    device = pick_device(arguments.device)
    path = _record.write(name, found, settings=noted, control="standard", device=device, folder=arguments.results)
    path.with_suffix(".png").write_bytes(draw_frontier(outcome))
    return path


def main() -> None:
    """Run or resume one setting and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=sorted(SHAPES))
    parser.add_argument(
        "--model", type=Path, required=True, help="folder of the pretrained model; may hold a GGUF file"
    )
    parser.add_argument("--gsm8k", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--work", type=Path, required=True, help="folder of the studies; goes on with what is there")
    parser.add_argument("--name", help="of the result, instead of frontier_SETTING_MODEL")
    parser.add_argument("--results", type=Path, default=_record.RESULTS)
    parser.add_argument("--epochs", type=float, default=1.0, help="of the standard arm; the others get its time")
    parser.add_argument("--steps", type=int, help="of the standard arm, instead of --epochs")
    parser.add_argument("--seconds", type=float, help="of every run, instead of --epochs")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4], help="one: the same for all arms")
    parser.add_argument("--rate-share", type=float, default=0.5, help="how long a rate is tried, as a share of a run")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--without", nargs="+", metavar="ARM", default=[], help="arms to leave out")
    parser.add_argument("--evaluations", type=int, default=8)
    parser.add_argument("--stop-after", type=float, metavar="SECONDS")
    parser.add_argument("--memory-limit", help="bytes of a step, 24GB say")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, help="runs at a time on one GPU")
    parser.add_argument("--questions", type=int, help="test problems to answer; without it all")
    parser.add_argument("--answers-of", nargs="+", metavar="ARM", default=[], help="at equal tokens alone; else of all")
    parser.add_argument("--problems", type=int, help="training problems; without it all")
    parser.add_argument("--eval-sequences", type=int, default=256, help="of an evaluation of the loss")
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--calibration-seconds", type=float, default=4.0)
    parser.add_argument("--timing-turns", type=int, default=2)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    if arguments.stop_after is not None:
        stop_by_itself(arguments.stop_after)
    console = Console(width=150)
    name = arguments.name or f"frontier_{arguments.setting}_{arguments.model.name.lower().replace('-', '_')}"
    folder = arguments.work / name
    asked = settings(arguments.setting, arguments)
    if not (folder / STUDY).exists():
        prepare_study(asked, folder, console)
        save_arms(folder, compared(load_arms(folder), arguments.ratio, arguments.without))
    found = run(folder, asked, console)
    draw_trials(write_trials(folder, asked, arguments, name))
    if found is None:
        raise SystemExit("not one seed was done by all arms; the same command goes on")
    path = write_result(found[0], dataclasses.replace(asked, seeds=found[1]), arguments, name)
    console.print(f"result {path}", highlight=False)


if __name__ == "__main__":
    main()
