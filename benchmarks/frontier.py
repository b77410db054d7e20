"""What someone who fine-tunes a pretrained model weighs: seconds, gigabytes, and how many problems it then solves.

Every arm of a setting trains the same model on GSM8K for the time that the standard step takes for the epochs asked
for, each with the learning rate that suits it, and answers all test problems by greedy decoding.

``answers``   a question and its answer, which alone is supervised
``context``   the same behind other questions, 2,048 tokens, of which about 6% are supervised
``batches``   the standard step at batch 1 and at batch 4 against routed steps at batch 4, for ``--seconds``

The controls are the standard step with gradient checkpointing, at the batch of equal cost, and with as many sequences
at a time as the routed step's memory has room for; random tokens at the same ratio; and the exact gradient of sampled
ones. A run that was stopped goes on when the same command is given again.
"""

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console

from benchmarks import _record
from benchmarks.gsm8k import MARK, among_others, read_problems, write_problems
from benchmarks.study import rows
from cggr_train.device import pick_device
from cggr_train.option_checks import parse_bytes
from cggr_train.report.plots import draw_frontier
from cggr_train.report.verdict import verdict
from cggr_train.settings import TrainSettings
from cggr_train.study import StudySettings, resume_study
from cggr_train.study.analysis import Outcome
from cggr_train.study.arms import CONTROLS, load_arms, save_arms
from cggr_train.study.run import prepare_study
from cggr_train.study.settings import STUDY
from cggr_train.tokenizer import load_tokenizer

SHAPES: dict[str, dict[str, int]] = {
    "answers": {"length": 512, "batch_size": 32},
    "context": {"length": 2048, "batch_size": 16},
    "batches": {"length": 512, "batch_size": 4},
}
SAME_AS_STANDARD = ("exact-supervised",)
"""The gradient of all supervised tokens, which is the standard one."""


def data_files(setting: str, arguments: argparse.Namespace) -> tuple[Path, Path]:
    """What is trained on and what is held out, written once into the work folder."""
    train, test = (read_problems(arguments.gsm8k / f"{name}.jsonl") for name in ("train", "test"))
    folder = arguments.work / "data" / ("context" if setting == "context" else "answers")
    if setting == "context" and not (folder / "test.jsonl").exists():
        tokenizer, length = load_tokenizer(str(arguments.model)), arguments.length or SHAPES[setting]["length"]
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
    steps = None if arguments.seconds else max(1, round(arguments.epochs * problems / batch_size))
    train = TrainSettings(
        data=(str(data),), heldout=(str(heldout),), field="question", answer="answer", model=str(arguments.model),
        length=length, batch_size=batch_size, steps=steps, seconds=arguments.seconds, weight_decay=0.01,
        learning_rate=arguments.rates[0], eval_sequences=arguments.eval_sequences, device=arguments.device,
    )  # fmt: skip
    return StudySettings(
        train=train,
        gradients=("kv",) if setting == "batches" else ("kv", "exact"),
        ratios=tuple(arguments.ratios),
        selections=("supervised", "sampled"),
        batch_sizes=(1,) if setting == "batches" else (),
        seeds=arguments.seeds,
        equal=("time",),
        evaluations=4,
        draws=0,
        parallel=arguments.parallel,
        calibration_seconds=arguments.calibration_seconds,
        controls=CONTROLS,
        memory_limit=parse_bytes("--memory-limit", arguments.memory_limit) if arguments.memory_limit else None,
        rates=tuple(arguments.rates) if len(arguments.rates) > 1 else (),
        accuracy=True,
        answer_after=MARK,
        questions=arguments.questions,
    )


def write_result(outcome: Outcome, asked: StudySettings, arguments: argparse.Namespace, name: str) -> Path:
    """The JSON and the plot of one setting."""
    found = rows(outcome)
    for arm in outcome.arms:
        found[arm.name] |= {
            "accuracy": outcome.accuracy.get(arm.name),
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
    parser.add_argument("--seconds", type=float, help="of every run, instead of --epochs")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-5, 1e-4, 3e-4], help="one: the same for all arms")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25])
    parser.add_argument("--memory-limit", help="bytes of a step, 24GB say")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, help="runs at a time on one GPU")
    parser.add_argument("--questions", type=int, help="test problems to answer; without it all")
    parser.add_argument("--eval-sequences", type=int, default=256, help="of an evaluation of the loss")
    parser.add_argument("--length", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--calibration-seconds", type=float, default=4.0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    console = Console(width=150)
    name = arguments.name or f"frontier_{arguments.setting}_{arguments.model.name.lower().replace('-', '_')}"
    folder = arguments.work / name
    if not (folder / STUDY).exists():
        prepare_study(settings(arguments.setting, arguments), folder, console)
        save_arms(folder, [arm for arm in load_arms(folder) if arm.name not in SAME_AS_STANDARD])
    result = resume_study(folder, console)
    if result.outcome is None:
        raise SystemExit(result.exit_code)
    path = write_result(result.outcome, StudySettings.load(folder), arguments, name)
    console.print(f"result {path}", highlight=False)


if __name__ == "__main__":
    main()
