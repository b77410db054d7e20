"""How well a learned router ranks tokens, against a truncated router of the same depth.

``python -m benchmarks.learned_router_quality cpu`` (two cores, half an hour), ``... 40m`` and ``... 135m`` (one CUDA
device). A model is trained from scratch on the standard library's own source, with tokens chosen by the learned router;
at intervals, held-out tokens are ranked by the true score (logit-gradient norm at full depth), by the learned router's
predictions and by the truncated router's scores. Several seeds; the bar is the truncated router.
"""

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks import _record
from benchmarks._language_model import WARMUP, Size, training
from cggr_core import CGGRModel, TruncatedRouter
from cggr_core.experimental import LearnedRouter
from cggr_train.data.batches import in_order

RATIO = 0.25
TRUNCATED, LEARNED = "truncated router", "learned router"
# Size of the model -> layers of both routers.
DEPTHS = {"cpu": 1, "40m": 2, "135m": 4}
SIZES = {
    "cpu": Size(8, 128, 4, 1024, 2_000_000, 8, 128, 800, 80, 2e-3, "cpu"),
    "40m": Size(12, 512, 8, 8192, 16_000_000, 16, 512, 800, 80, 1e-3, "cuda"),
    "135m": Size(30, 576, 9, 8192, 16_000_000, 8, 1024, 500, 50, 1e-3, "cuda"),
}


def ranks(values: Tensor) -> Tensor:
    """Rank of every value, in float64."""
    order = torch.arange(len(values), dtype=torch.float64, device=values.device)
    return torch.empty_like(order).scatter_(0, values.argsort(), order)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation; ties, rare among continuous scores, are ranked in order of appearance."""
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


@torch.no_grad()
def rankings(wrapped: CGGRModel, depth: int, input_ids: Tensor) -> dict[str, float]:
    """Rank correlation of both routers with the true score of held-out tokens."""
    inputs, truncated = {"input_ids": input_ids}, TruncatedRouter(wrapped.model, depth)
    targets = torch.cat([input_ids[:, 1:], input_ids.new_full((len(input_ids), 1), -100)], dim=1)
    countable = targets != -100

    def scores(router: TruncatedRouter) -> Tensor:
        found = router.statistics(inputs, targets, fields={"gradnorm"}).gradnorm
        assert found is not None  # asked for
        return found[countable]

    truth, found = scores(TruncatedRouter(wrapped.model, 0)), {TRUNCATED: scores(truncated)}
    assert isinstance(wrapped.router, LearnedRouter)
    passes = truncated.engine
    learned = wrapped.router(passes.hidden(inputs, depth=depth), passes.embeddings(targets.clamp(min=0)))
    found[LEARNED] = learned[countable]
    return {name: rank_correlation(score, truth) for name, score in found.items()}


def train(
    size: Size, seed: int, *, depth: int, seconds: float, stream: np.ndarray, heldout: np.ndarray
) -> dict[str, list[float]]:
    """Rank correlations at intervals of one training, which ends after ``seconds`` at the latest."""
    start = time.monotonic()
    wrapped = CGGRModel(size.model(seed), LearnedRouter(depth, seed=seed), min_tokens_ratio=RATIO, seed=seed)
    ranked = torch.cat(in_order(heldout, length=size.length, batch_size=4, limit=8)).to(size.device)
    curves: dict[str, list[float]] = {TRUNCATED: [], LEARNED: []}
    for step, loss in training(wrapped, size, stream, seed=seed):
        if step % size.every == 0:
            with size.precision():
                found = rankings(wrapped, depth, ranked)
            for name, value in found.items():
                curves[name].append(value)
            told = " ".join(f"{name} {value:.3f}" for name, value in found.items())
            print(f"seed {seed} step {step:4} loss {loss:.3f} {told}", flush=True)
            if time.monotonic() - start > seconds:
                break
    return curves


def write(name: str, size: Size, depth: int, seeds: list[int], runs: list[dict[str, list[float]]]) -> None:
    """Write the curves of the seeds so far, up to the last step that all reached, and their plot."""
    rankings_of_all = min(len(run[LEARNED]) for run in runs)
    runs = [{router: curve[:rankings_of_all] for router, curve in run.items()} for run in runs]
    rows: dict[str, dict[str, Any]] = {}
    for router in (TRUNCATED, LEARNED):
        curves = [run[router] for run in runs]
        rows[router] = _record.summary([curve[-1] for curve in curves]) | {"unit": "rank correlation", "curves": curves}
    pairs = [zip(run[LEARNED], run[TRUNCATED], strict=True) for run in runs]
    gains = [[learned - truncated for learned, truncated in pair] for pair in pairs]
    # The first ranking is that of an untrained model.
    means = [statistics.mean(gain[1:]) for gain in gains]
    read = {"last ranking": [gain[-1] for gain in gains], "mean over rankings": means}
    for row, chosen in read.items():
        bar = {"every seed": 0.0, "met": min(chosen) >= 0}
        rows[f"learned - truncated, {row}"] = _record.summary(chosen) | {"unit": "rank correlation", "bar": bar}
    steps = (rankings_of_all - 1) * size.every
    settings = asdict(size) | {
        "depth": depth,
        "steps": steps,
        "keep_ratio": RATIO,
        "seed": seeds[: len(runs)],
        "scoring": "gradnorm",
    }
    settings |= {"selection": "stratified", "optimizer": "AdamW", "warmup": WARMUP}
    path = _record.write(name, rows, settings=settings, control=TRUNCATED, device=size.device)
    draw(_record.load(name), path.with_suffix(".png"))


def draw(result: dict[str, Any], path: Any) -> None:
    """Rank correlation over the steps: a line per router, with a band over seeds."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    settings = result["settings"]
    steps = range(0, settings["steps"] + 1, settings["every"])
    for name, colour in ((TRUNCATED, "0.5"), (LEARNED, "#2a6f97")):
        at_step = list(zip(*result["rows"][name]["curves"], strict=True))
        axes.plot(steps, [statistics.median(values) for values in at_step], color=colour, label=name)
        axes.fill_between(steps, [min(v) for v in at_step], [max(v) for v in at_step], color=colour, alpha=0.2)
    axes.axhline(0, color="0.85", linewidth=0.8, zorder=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("rank correlation with the true score")
    model = f"depth {settings['depth']} of {settings['layers']} layers of {settings['hidden']}"
    seeds = f"median and range of {len(settings['seed'])} seeds"
    axes.set_title(f"Held-out tokens, {model}; {seeds}", fontsize=9, loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train, rank, and write the curves after each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the size's own")
    parser.add_argument("--at-once", type=int, default=1, help="seeds trained side by side")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="most seconds of a seed's training")
    parser.add_argument("--untied", action="store_true", help="a separate head instead of the embedding")
    options = parser.parse_args()
    size, depth = SIZES[options.size], DEPTHS[options.size]
    size = replace(size, tied=not options.untied, steps=options.steps or size.steps)
    stream, heldout = size.text()
    runs = []
    with ProcessPoolExecutor(options.at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
        work = partial(train, size, depth=depth, seconds=options.seconds, stream=stream, heldout=heldout)
        for run in pool.map(work, options.seeds):
            runs.append(run)
            write(
                f"learned_router_quality_{options.size}{'_untied' * options.untied}", size, depth, options.seeds, runs
            )


if __name__ == "__main__":
    main()
