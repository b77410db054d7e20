"""What ``context_precision="fp8"`` does to kept tokens, and to what a model learns.

``error``     outputs and gradients of kept tokens of a bfloat16 model, with other tokens in bfloat16 and in FP8, each
              against float32 throughout: at 1B sizes with random weights, and with ``--model`` on a pretrained model
              and its fine-tuning text
``scores``    scores of all tokens, at full depth and after the first layers, and how many kept tokens are others
``finetune``  the same model fine-tuned on GSM8K behind other questions, loss and gradients on the answers
``scratch``   a small model trained from scratch on the standard library's source, a quarter of the tokens kept

Trainings use the same batches and selections in both precisions, several at a time, and report held-out losses.
"""

import argparse
import copy
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import _frontier_data, _record
from benchmarks._language_model import Size, training
from benchmarks._steps import SHAPES
from benchmarks.gsm8k import among_others, read_problems, write_problems
from cggr_core import (
    CGGRModel,
    create_truncated_router,
    keep_random,
    linear_token_statistics,
    routed_hidden,
    routed_logprobs,
    score,
    select,
)
from cggr_core.routing import Engine
from cggr_train.data import Batches, Documents, build_example_store, split_supervised
from cggr_train.data.batches import in_order
from cggr_train.evaluate import heldout_loss
from cggr_train.presets import load_model
from cggr_train.tokenizer import load_tokenizer

SEED = 0
RATIO = 0.25
MODES = ("kv", "detached")
OWN, LOW = "as the model", "in fp8"
PRECISIONS: dict[str, str | None] = {OWN: None, LOW: "fp8"}
SIZES = {
    "cuda": Size(8, 512, 8, 8192, 8_000_000, 16, 512, 600, 150, 1e-3, "cuda"),
    "cpu": Size(4, 192, 4, 1024, 3_000_000, 8, 128, 300, 150, 2e-3, "cpu"),
}


def of_kept(model: nn.Module, input_ids: Tensor, mode: str, precision: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of the kept tokens ``[N, H]`` and the gradients of their log-probabilities' mean."""
    options: dict[str, Any] = {"gradient_mode": mode, "context_precision": precision}
    countable = torch.ones_like(input_ids, dtype=torch.bool)
    countable[:, -1] = False
    selection = keep_random(countable, RATIO, seed=SEED, draw=0)
    hidden = routed_hidden(model, input_ids, keep=selection, **options).hidden.detach().float()
    found = routed_logprobs(model, input_ids, keep=selection, **options)
    (-found.logprob.sum() / selection.valid.sum()).backward()
    gradients = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return hidden[selection.valid], gradients


def distances(found: tuple[Tensor, dict[str, Tensor]], truth: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Any]:
    """Distance of outputs and gradients from the float32 truth."""
    error = (found[0] - truth[0]).norm(dim=-1) / truth[0].norm(dim=-1)
    spread = [float(error.quantile(share)) for share in (0.25, 0.5, 0.75, 0.95)]
    difference, product, own, wanted = 0.0, 0.0, 0.0, 0.0
    worst = 1.0
    for name, expected in truth[1].items():
        value = found[1][name]
        difference += float((value - expected).double().square().sum())
        parts = [
            float((a.double() * b.double()).sum()) for a, b in ((value, expected), (value, value), (expected,) * 2)
        ]
        product, own, wanted = product + parts[0], own + parts[1], wanted + parts[2]
        if parts[2] > 0:
            worst = min(worst, parts[0] / max(parts[1] * parts[2], 1e-300) ** 0.5)
    return {
        "median": spread[1],
        "spread": [spread[0], spread[2]],
        "samples": int(error.numel()),
        "unit": "relative error of a kept token's hidden state",
        "output_error_95": spread[3],
        "gradient_error": (difference / wanted) ** 0.5,
        "gradient_cosine": product / (own * wanted) ** 0.5,
        "least_cosine_of_a_parameter": worst,
    }


def errors(name: str, model: nn.Module, input_ids: Tensor, until: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Distances of both precisions from float32, for both modes."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    model.float()
    for mode in MODES:
        if _record.is_over(until):
            return
        truth = of_kept(model, input_ids, mode, None)
        for precision, setting in PRECISIONS.items():
            yield f"{name}, {mode}, context {precision}", distances(of_kept(half, input_ids, mode, setting), truth)


def scores_of(model: nn.Module, input_ids: Tensor, depth: int, layers: str | None, head: str | None) -> Tensor:
    """Scores ``[B, S]`` after ``depth`` layers, with layers and head in a precision each."""
    engine: Any = Engine(model)
    inputs = engine.inputs(input_ids=input_ids)
    engine.prepare(inputs, routing=True)
    values = engine.context(inputs, depth=depth, keep_graph=False, head=True, precision=layers)[1]
    weight = engine.architecture.head.linear.weight
    targets = input_ids.roll(-1, 1)
    statistics = linear_token_statistics(values, weight, targets, fields={"gradnorm"}, precision=head)
    return score(statistics, scoring="gradnorm")


def score_errors(name: str, model: nn.Module, input_ids: Tensor, until: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Scores in bfloat16, with the head in FP8, and with layers and head in it, against float32 throughout."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    model.float()
    countable = torch.ones_like(input_ids, dtype=torch.bool)
    countable[:, -1] = False
    layers = Engine(model).depth
    precisions = {OWN: (None, None), "head in fp8": (None, "fp8"), "layers and head in fp8": ("fp8", "fp8")}
    for depth in (layers, create_truncated_router(model).num_layers):
        if _record.is_over(until):
            return
        truth = scores_of(model, input_ids, depth, None, None)
        kept = select(truth, countable, ratio=RATIO, selection="topk").mask
        for precision, (of_layers, of_head) in precisions.items():
            found = scores_of(half, input_ids, depth, of_layers, of_head)
            apart = (found - truth)[countable].abs() / truth[countable]
            quartiles = [float(apart.quantile(share)) for share in (0.25, 0.5, 0.75)]
            others = select(found, countable, ratio=RATIO, selection="topk").mask & ~kept
            yield (
                f"{name}, {'full depth' if depth == layers else f'{depth} of {layers} layers'}, {precision}",
                {
                    "median": quartiles[1],
                    "spread": [quartiles[0], quartiles[2]],
                    "samples": int(apart.numel()),
                    "unit": "relative error of a token's score",
                    "score_error": float((found - truth)[countable].norm() / truth[countable].norm()),
                    "kept_that_differ": float(others.sum() / kept.sum()),
                },
            )


def measure_scores(arguments: argparse.Namespace, until: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """The errors of scores, with a pretrained model."""
    model: Any = load_model(str(arguments.model)).to(arguments.device).train()
    _, heldout = examples(arguments)
    rows = next(
        iter(in_order(heldout, length=arguments.length, batch_size=arguments.batch_size, limit=arguments.batch_size))
    )
    yield from score_errors(arguments.model.name, model, split_supervised(rows.to(arguments.device))[0], until)


def measure_errors(arguments: argparse.Namespace, until: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """The errors with random weights, and with a pretrained model."""
    shape = SHAPES["1b" if arguments.device == "cuda" else "cpu"]
    batch, length = arguments.batch_size, arguments.length
    tokens = shape.tokens()[:batch, :length]
    yield from errors("random weights", shape.model(), tokens, until)
    if arguments.model is not None:
        model: Any = load_model(str(arguments.model)).to(arguments.device).train()
        _, heldout = examples(arguments)
        rows = next(iter(in_order(heldout, length=length, batch_size=batch, limit=batch)))
        yield from errors(arguments.model.name, model, split_supervised(rows.to(arguments.device))[0], until)


def examples(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """GSM8K behind other questions: training and held-out rows, of which the answers are supervised."""
    if arguments.rows is not None:
        rows = _frontier_data.load(arguments.rows)[0]
        return tuple(side.flatten().numpy() for side in (rows.train, rows.test))
    tokenizer = load_tokenizer(str(arguments.model))
    train, test = (read_problems(arguments.gsm8k / f"{name}.jsonl") for name in ("train", "test"))
    length, folder = arguments.length, arguments.work / f"context_{arguments.length}"
    files = []
    for name, problems, seed in (("train", train, 0), ("test", test, 1)):
        path = folder / f"{name}.jsonl"
        if not path.exists():
            problems = among_others(problems[: arguments.problems], train, tokenizer, length=length, seed=seed)
        files.append(write_problems(path, problems))
    data, heldout = (Documents([path], field="question,answer") for path in files)
    store = build_example_store(data, tokenizer, folder / "tokens", length=length, heldout_documents=heldout)
    return store.train, store.heldout


def finetuned(arguments: argparse.Namespace) -> Callable[[str, str | None, int], float]:
    """Held-out loss of the answers after fine-tuning, by mode, precision and seed."""
    base: Any = load_model(str(arguments.model)).to(arguments.device)
    train, heldout = examples(arguments)
    rows = {"length": arguments.length, "batch_size": arguments.batch_size}
    half = arguments.device == "cuda"
    steps = arguments.steps or 150

    def run(mode: str, precision: str | None, seed: int) -> float:
        model = copy.deepcopy(base).train()
        wrapped = CGGRModel(model, gradient=mode, selection="supervised", context_precision=precision, seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / 10) * (1 - n / steps))
        order = Batches(train, **rows, seed=seed)
        for number in range(steps):
            input_ids, labels = split_supervised(order.get(number).to(arguments.device))
            with torch.autocast(arguments.device, dtype=torch.bfloat16, enabled=half):
                loss = wrapped(input_ids, labels=labels)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad(set_to_none=True)
        batches = in_order(heldout, **rows, limit=arguments.eval_sequences)
        return heldout_loss(model, batches, device=torch.device(arguments.device), bfloat16=half)

    return run


def from_scratch(arguments: argparse.Namespace) -> Callable[[str, str | None, int], float]:
    """Held-out loss after training from scratch, by mode, precision and seed."""
    size = SIZES[arguments.device]
    if arguments.steps:
        size = Size(**{**vars(size), "steps": arguments.steps})
    stream, held = size.text()

    def run(mode: str, precision: str | None, seed: int) -> float:
        options: dict[str, Any] = {"gradient": mode, "selection": "random", "min_tokens_ratio": RATIO}
        wrapped = CGGRModel(size.model(seed), context_precision=precision, seed=seed, **options).train()
        for _ in training(wrapped, size, stream, seed=seed):
            pass
        return heldout_of(wrapped, size, held, arguments.eval_sequences)

    return run


@torch.no_grad()
def heldout_of(wrapped: CGGRModel, size: Size, held: np.ndarray, sequences: int) -> float:
    """Mean loss of held-out rows."""
    wrapped.eval()
    rows = torch.from_numpy(held[: len(held) // size.length * size.length].reshape(-1, size.length))[:sequences]
    losses = []
    for part in rows.split(size.batch):
        with size.precision():
            losses.append(wrapped(part.to(size.device), labels=part.to(size.device)).loss.float() * len(part))
    return float(torch.stack(losses).sum() / len(rows))


Run = tuple[str, str, int]
"""Gradient mode, name of the precision, seed."""


def all_at_once(arguments: argparse.Namespace, runs: list[Run], until: float) -> Iterator[tuple[Run, float]]:
    """Held-out loss of every run, ``--parallel`` of them at a time, yielded as they finish."""
    threads = max(1, torch.get_num_threads() // arguments.parallel)
    with multiprocessing.get_context("spawn").Pool(arguments.parallel, _begin, (arguments, threads, until)) as pool:
        for run, loss in pool.imap_unordered(_one, runs):
            if loss is not None:
                yield run, loss
        pool.close()
        pool.join()


_here: dict[str, Any] = {}


def _begin(arguments: argparse.Namespace, threads: int, until: float) -> None:
    torch.set_num_threads(threads)
    _here.update(train=MAKERS[arguments.what](arguments), until=until, runs=0)


def _one(run: Run) -> tuple[Run, float | None]:
    if _here["runs"] and _record.is_over(_here["until"]):
        return run, None
    _here["runs"] += 1
    mode, name, seed = run
    return run, _here["train"](mode, PRECISIONS[name], seed)


def measure_training(arguments: argparse.Namespace, until: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Held-out losses of every mode and precision, seed by seed, until time is up."""
    losses: dict[tuple[str, str], dict[int, float]] = {}
    runs = [(mode, name, seed) for seed in range(arguments.seeds) for mode in arguments.modes for name in PRECISIONS]
    for (mode, name, seed), loss in all_at_once(arguments, runs, until):
        losses.setdefault((mode, name), {})[seed] = loss
        rows = [(row, losses[row]) for row in itertools.product([mode], PRECISIONS) if row in losses]
        control = losses.get((mode, OWN), {})
        for (_, precision), found in rows:
            apart = {seed: value - control[seed] for seed, value in found.items() if seed in control}
            numbers = _record.summary(list(found.values())) | {"unit": "nat", "losses": found, "more_than_own": apart}
            yield f"{mode}, context {precision}", numbers


MAKERS: dict[str, Callable[[argparse.Namespace], Callable[[str, str | None, int], float]]] = {
    "finetune": finetuned,
    "scratch": from_scratch,
}


MEASURES: dict[str, Callable[[argparse.Namespace, float], Iterator[tuple[str, dict[str, Any]]]]] = {
    "error": measure_errors,
    "scores": measure_scores,
}


def main() -> None:
    """Measure, write after every row, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("error", "scores", "finetune", "scratch"))
    parser.add_argument("--model", type=Path, help="folder of a pretrained model; scores and finetune need one")
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl and test.jsonl, for a pretrained model")
    parser.add_argument("--rows", type=Path, help="rows tokenized by benchmarks.frontier, instead of --gsm8k")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--parallel", type=int, default=1, help="trainings at a time")
    parser.add_argument("--work", type=Path, default=Path("context_precision_work"), help="folder for tokens")
    parser.add_argument("--problems", type=int, default=4000, help="at most this many problems of GSM8K")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, help="of a training")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--eval-sequences", type=int, default=256)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the result")
    _record.add_seconds(parser)
    arguments = parser.parse_args()
    if arguments.model is not None and arguments.gsm8k is None and arguments.rows is None:
        parser.error("--model needs --gsm8k or --rows")
    if arguments.rows is not None:
        arguments.length = _frontier_data.load(arguments.rows)[0].train.shape[1]
    if arguments.what in ("scores", "finetune") and arguments.model is None:
        parser.error(f"{arguments.what} needs --model")
    arguments.batch_size = arguments.batch_size or (4 if arguments.what in MEASURES else 16)
    until = _record.deadline(arguments.seconds)
    found = MEASURES.get(arguments.what, measure_training)(arguments, until)
    rows: dict[str, dict[str, Any]] = {}
    settings = {
        "seed": SEED, "ratio": RATIO, "model": arguments.model and arguments.model.name, "steps": arguments.steps,
        "batch": arguments.batch_size, "length": arguments.length, "seeds": arguments.seeds,
        "rows": arguments.rows and arguments.rows.name, "parallel": arguments.parallel,
    }  # fmt: skip
    name = "_".join(["context_precision", arguments.what, *([] if arguments.device == "cuda" else ["cpu"])])
    where = {"device": arguments.device, "folder": arguments.output}
    for row, numbers in found:
        rows[row] = numbers
        print(f"{row:50} {numbers['median']:.4g} {numbers.get('gradient_cosine', '')}", flush=True)
        path = _record.write(name, rows, settings=settings, control=min(rows, key=lambda row: OWN not in row), **where)
    _record.plot(_record.load(name, folder=arguments.output), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
