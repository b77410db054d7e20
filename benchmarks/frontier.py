"""The trade-off in fine-tuning a pretrained model: time, memory, and the quality of the result.

Every arm of a setting trains the same model on GSM8K for the same time, and is judged by its held-out loss and by the
number of test problems it then answers. Steps are timed first, with nothing else on the GPU: eagerly, recorded as one
CUDA graph, and as recorded by ``CGGRModel``. An arm then takes as many steps as fit in the time, so other work on the
GPU does not affect the comparison. Arms that compute the same (checkpointed, or fewer sequences at a time) share one
run.

``context``   a question behind others, 2,048 tokens, of which 6% are supervised
``answers`` a question and its answer; only the answer is supervised: one and three epochs ``context-parts``,
``answers-parts``
              half of the supervised tokens, kept in different units, and routing in half of the layers, over fewer rows
              in more epochs
``batches``   the standard step at batch 1 and at batch 4 against routed steps at batch 4
``toy``       a few steps, to try the benchmark on a CPU

Learning rates are chosen on separate rows. The same command continues an interrupted run; at the end of ``--seconds``
it reports on the seeds that all arms have finished.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import _record
from benchmarks._frontier_arms import SETTINGS
from benchmarks._frontier_data import load, prepare
from benchmarks._frontier_plan import setting_of
from benchmarks._frontier_study import Study


def main() -> None:
    """Run or resume one setting, and write its result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=sorted(SETTINGS))
    parser.add_argument("--model", type=Path, required=True, help="folder of the pretrained model, or of its GGUF file")
    parser.add_argument("--tokenizer", type=Path, help="folder of its tokenizer; default: the model's")
    parser.add_argument("--config", type=Path, help="its config.json: steps are timed while a GGUF file is read")
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl and test.jsonl, to make --rows of")
    parser.add_argument("--rows", type=Path, required=True, help="the tokenized problems; created if missing")
    parser.add_argument("--work", type=Path, required=True, help="of the weights")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="records; continues from existing ones")
    parser.add_argument("--name", help="of the result, instead of frontier_SETTING_MODEL")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="arms of the setting, including the standard one")
    parser.add_argument("--time", type=float, help="seconds that every arm gets, instead of the setting's")
    parser.add_argument("--steps", type=int, help="steps of the arm that sets the time, instead of --time")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="learning rates to try for every arm; a single one is used as given"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=3, help="runs at a time")
    parser.add_argument("--questions", type=int, default=330, help="test problems to answer; 0 for none")
    parser.add_argument("--answers", choices=("all", "equal"), default="all", help="equal: only after equal examples")
    parser.add_argument("--as-recorded", action="store_true", help="do not time steps recorded by CGGRModel itself")
    parser.add_argument("--questions-at-a-time", type=int, default=330)
    parser.add_argument("--eval-rows", type=int, default=96)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=540.0, help="after which everything is at an end")
    arguments = parser.parse_args()
    tokenizer = arguments.tokenizer or arguments.model
    setting = setting_of(arguments)
    if not arguments.rows.exists():
        from cggr_train.tokenizer import load_tokenizer

        if arguments.gsm8k is None:
            parser.error(f"{arguments.rows} is not there; give --gsm8k to make it of")
        prepare(arguments.rows, setting, arguments.gsm8k, load_tokenizer(str(tokenizer)))
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    model = arguments.model.name.lower().replace("-", "_")
    arguments.name = arguments.name or f"frontier_{arguments.setting}_{model}"
    told = {
        "setting": arguments.setting, "rows": str(arguments.rows), "model": str(arguments.model),
        "weights": str(arguments.work / f"model_{model}"), "tokenizer": str(tokenizer),
        "config": None if arguments.config is None else str(arguments.config), "device": arguments.device,
        "questions": arguments.questions, "questions_at_a_time": arguments.questions_at_a_time,
        "threads": max(1, torch.get_num_threads() // (arguments.parallel + 1)),
    }  # fmt: skip
    noted = {
        "model": arguments.model.name, "parallel": arguments.parallel, "ways": list(setting.ways),
        "rates": arguments.rates, "answers": arguments.answers, **load(arguments.rows, limit=setting.limit)[1],
    }  # fmt: skip
    study = Study(arguments, told, noted, arguments.output / f"{arguments.name}.jsonl")
    study.run()
    study.write()


if __name__ == "__main__":
    main()
