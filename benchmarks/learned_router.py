"""A learned router beside a truncated one: how well each ranks the tokens, and what a step with each costs.

``python -m benchmarks.learned_router quality`` trains a small model on the standard library's own source, with a
learned router choosing the tokens, and compares rankings of held-out tokens by the true score (logit-gradient norm at
full depth): the learned router's predictions against the truncated router's scores at the same depth, over the steps,
for three seeds. ``... cost cpu`` and ``... cost 1b`` time the steps of ``step_time``'s shapes.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import _record
from benchmarks.step_time import SHAPES, peak_on_device, standard_step
from cggr_core import CGGRModel, LearnedRouter, RememberedScores, create_truncated_router
from cggr_core.readout import HeadReadout
from cggr_core.router import router_statistics

DEPTH, RATIO, SEEDS = 1, 0.25, (0, 1, 2)
VOCAB, LENGTH, BATCH, STEPS, EVERY = 1024, 128, 8, 800, 80
SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 8, "num_attention_heads": 4}
TRUNCATED, LEARNED = "truncated router", "learned router"


def text() -> tuple[np.ndarray, np.ndarray]:
    """Token ids to train on and to rank, from the standard library's source."""
    from cggr_train.demo.corpus import standard_library
    from cggr_train.tokenizer import train_tokenizer

    documents = standard_library(max_characters=2_000_000)
    tokenizer = train_tokenizer(documents, vocab_size=VOCAB)
    ids = [np.array(row, dtype=np.int64) for row in tokenizer(documents, add_special_tokens=False)["input_ids"]]
    held = max(1, len(ids) // 20)
    return np.concatenate(ids[held:]), np.concatenate(ids[:held])


def ranks(values: Tensor) -> Tensor:
    """Rank of every value, in float64."""
    order = torch.arange(len(values), dtype=torch.float64)
    return torch.empty_like(order).scatter_(0, values.argsort(), order)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's; ties, which continuous scores hardly have, count as they come."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


@torch.no_grad()
def rankings(wrapped: CGGRModel, input_ids: Tensor) -> dict[str, float]:
    """Rank correlation of both routers with the true score of held-out tokens."""
    model, passes = wrapped.model, wrapped._passes
    targets = torch.cat([input_ids[:, 1:], input_ids.new_full((len(input_ids), 1), -100)], dim=1)
    countable = targets != -100
    inputs = {"input_ids": input_ids}
    readout = HeadReadout(passes.architecture.head, ignore_index=-100)
    truth = readout.statistics(passes.plain(inputs)[0], targets, fields={"gradnorm"}).gradnorm
    truncated = router_statistics(create_truncated_router(model, DEPTH), inputs, targets, fields={"gradnorm"}).gradnorm
    learned = wrapped.router(passes.hidden(inputs, depth=DEPTH), passes.embeddings(targets.clamp(min=0)))
    assert truth is not None and truncated is not None
    found = {TRUNCATED: truncated, LEARNED: learned}
    return {name: rank_correlation(score[countable], truth[countable]) for name, score in found.items()}


def train(seed: int, stream: np.ndarray, heldout: np.ndarray) -> dict[str, list[float]]:
    """Rank correlations every so many steps of one training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from cggr_train.data import Batches
    from cggr_train.data.batches import in_order

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=LENGTH, tie_word_embeddings=True, **SIZES)
    model = LlamaForCausalLM(config).train()
    wrapped = CGGRModel(model, LearnedRouter(DEPTH, seed=seed), min_tokens_ratio=RATIO, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    batches = Batches(stream, length=LENGTH, batch_size=BATCH, seed=seed)
    ranked = torch.cat(in_order(heldout, length=LENGTH, batch_size=32, limit=32))
    curves: dict[str, list[float]] = {TRUNCATED: [], LEARNED: []}
    for step in range(STEPS + 1):
        input_ids = batches.get(step)
        wrapped(input_ids, labels=input_ids).backward()
        if step % EVERY == 0:
            for name, value in rankings(wrapped, ranked).items():
                curves[name].append(value)
            print(f"seed {seed} step {step:4} " + " ".join(f"{name} {curve[-1]:.3f}" for name, curve in curves.items()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return curves


def quality() -> None:
    """Train, rank, and write the curves."""
    stream, heldout = text()
    runs = [train(seed, stream, heldout) for seed in SEEDS]
    steps = list(range(0, STEPS + 1, EVERY))
    rows: dict[str, dict[str, Any]] = {}
    for name in (TRUNCATED, LEARNED):
        curves = [run[name] for run in runs]
        rows[name] = _record.summary([curve[-1] for curve in curves]) | {"unit": "rank correlation", "curves": curves}
    last = [zip(run[TRUNCATED][-4:], run[LEARNED][-4:], strict=True) for run in runs]
    gains = [learned - truncated for run in last for truncated, learned in run]
    rows["bar: learned above truncated, last four rankings"] = _record.summary(gains) | {
        "unit": "rank correlation",
        "met": min(gains) > 0,
    }
    settings = SIZES | {"vocabulary": VOCAB, "length": LENGTH, "batch": BATCH, "steps": steps, "depth": DEPTH}
    settings |= {"keep_ratio": RATIO, "seed": list(SEEDS), "scoring": "gradnorm", "selection": "stratified"}
    path = _record.write("learned_router_quality", rows, settings=settings, control=TRUNCATED)
    draw(_record.load("learned_router_quality"), path.with_suffix(".png"))


def draw(result: dict[str, Any], path: Any) -> None:
    """Rank correlation over the steps: a line for each router, its seeds as a band."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    steps = result["settings"]["steps"]
    for name, colour in ((TRUNCATED, "0.5"), (LEARNED, "#2a6f97")):
        curves = result["rows"][name]["curves"]
        at_step = list(zip(*curves, strict=True))
        axes.plot(steps, [statistics.median(values) for values in at_step], color=colour, label=name)
        axes.fill_between(steps, [min(v) for v in at_step], [max(v) for v in at_step], color=colour, alpha=0.2)
    axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("rank correlation with the true score")
    axes.set_title(f"Depth {DEPTH} of {SIZES['num_hidden_layers']} layers; median and range of seeds", fontsize=9)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def steps_of(model: Any, tokens: Tensor) -> dict[str, Callable[[], None]]:
    """A step of every kind of router over one model, standard first."""
    depth = max(1, model.config.num_hidden_layers // 8)
    memory = RememberedScores.empty(examples=tokens.shape[0], length=tokens.shape[1])
    ids = torch.arange(tokens.shape[0])

    def step(router: Any, **inputs: Any) -> Callable[[], None]:
        selection = "random" if router is None else "stratified"
        wrapped = CGGRModel(model, router, min_tokens_ratio=RATIO, selection=selection)

        def run() -> None:
            wrapped(tokens, labels=tokens, **inputs).backward()
            model.zero_grad(set_to_none=True)

        return run

    return {
        "standard": standard_step(model, tokens),
        f"{TRUNCATED}, depth {depth}": step(create_truncated_router(model, depth)),
        f"{LEARNED}, depth {depth}": step(LearnedRouter(depth)),
        "remembered scores": step(memory, example_ids=ids),
        "random": step(None),
    }


def cost(name: str, rounds: int) -> None:
    """Time the steps of one shape of ``step_time``, interleaved engine, mode ``kv``."""
    shape = SHAPES[name]
    model, tokens = shape.model(), shape.tokens()
    steps = steps_of(model, tokens)
    rows = _record.measure(steps, control="standard", repeats=rounds, warmup=3, device=shape.device)
    for row, step in steps.items():
        if shape.device == "cuda":
            rows[row]["peak_extra_bytes"] = peak_on_device(step)
        print(f"{row:32} {rows[row]['median'] * 1e3:8.1f} ms {rows[row]['ratio']['median']:5.2f}x")
    settings = {key: str(value) for key, value in vars(shape).items()} | {"keep_ratio": RATIO, "seed": 0}
    name = f"learned_router_cost_{name}"
    path = _record.write(name, rows, settings=settings, control="standard", device=shape.device)
    _record.plot(_record.load(name), path.with_suffix(".png"), label="seconds per step")


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("quality", "cost"))
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="cpu", help="of the costs")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    if options.part == "quality":
        torch.set_num_threads(1)
        quality()
    else:
        cost(options.shape, options.rounds)


if __name__ == "__main__":
    main()
