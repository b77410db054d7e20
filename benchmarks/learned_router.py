"""The cost of a step with a learned router, against a truncated one, remembered scores and random selection.

``python -m benchmarks.learned_router cpu`` and ``... 1b`` time the steps of ``step_time``'s shapes, interleaved engine,
mode ``kv``. For how well a learned router ranks tokens, see ``benchmarks.learned_router_quality``.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import _record
from benchmarks._steps import FUSED, SHAPES, STEPS_IN_A_ROW, fused_step, standard_step
from benchmarks.step_time import peak_on_device
from cggr_core import CGGRModel, create_truncated_router
from cggr_core.experimental import LearnedRouter, RememberedScores

RATIO = 0.25
TRUNCATED, LEARNED = "truncated router", "learned router"


def steps_of(model: Any, tokens: Tensor) -> dict[str, Callable[[], None]]:
    """The standard step, the same with the fused ops of the routed passes, and a step with every kind of router."""
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
        FUSED: fused_step(model, standard_step(model, tokens)),
        f"{TRUNCATED}, depth {depth}": step(create_truncated_router(model, depth)),
        f"{LEARNED}, depth {depth}": step(LearnedRouter(depth)),
        "remembered scores": step(memory, example_ids=ids),
        "random": step(None),
    }


def cost(name: str, rounds: int, deadline: float) -> None:
    """Time the steps of one shape of ``step_time``, interleaved engine, mode ``kv``."""
    shape = SHAPES[name]
    model, tokens = shape.model(), shape.tokens()
    steps = steps_of(model, tokens)
    calls = STEPS_IN_A_ROW if shape.device == "cuda" else 1
    for step in steps.values():
        for _ in range(3):
            step()
    limits = {"rounds": rounds, "deadline": deadline, "calls": calls}
    rows = _record.measure_until(steps, control="standard", device=shape.device, **limits)
    for row, step in steps.items():
        if shape.device == "cuda":
            rows[row]["peak_extra_bytes"] = peak_on_device(step)
        print(f"{row:32} {rows[row]['median'] * 1e3:8.1f} ms {rows[row]['ratio']['median']:5.2f}x")
    settings = shape.settings() | {"keep_ratio": RATIO, "seed": 0}
    settings["steps_in_a_row"] = calls
    name = f"learned_router_cost_{name}"
    path = _record.write(name, rows, settings=settings, control="standard", device=shape.device)
    _record.plot(_record.load(name), path.with_suffix(".png"), label="seconds per step")


def main() -> None:
    """Run one shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=10)
    _record.add_seconds(parser)
    options = parser.parse_args()
    cost(options.shape, options.rounds, _record.deadline(options.seconds))


if __name__ == "__main__":
    main()
