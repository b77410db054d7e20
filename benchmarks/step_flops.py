"""Floating-point operations of a training step, against those in the table of gradient modes.

``CGGR_BACKEND=torch python -m benchmarks.step_flops --device cuda`` (a minute; on a CPU ``--shapes cpu`` alone) counts
the second step of each shape of ``step_time``, on the fewest rows that a variant takes. Ops are the plain-torch ones,
whose products can be counted. Attention is eager for the same reason, so no variant skips masked scores. The loss
computes the head's two gradient products during the forward pass; they are counted with the backward pass.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _record
from benchmarks._random_model import SEED
from benchmarks._steps import SHAPES, VARIANTS, Shape
from cggr_core import CGGRModel, backends, create_truncated_router

# Gradient mode and engine -> forward and backward in forwards F of the layers, at keep ratio r, router depth share d.
THEORY = {
    "two passes, full-depth scores, kv": "1 + r; 2r",
    "interleaved, truncated router, kv": "1 + r d; 2r",
    "interleaved, random, kv": "1; 2r",
    "two passes, random, kv": "1 + r; 2r",
    "two passes, full-depth scores, detached": "1 + r; 2r",
    "interleaved, truncated router, detached": "1 + r d; 2r",
    "interleaved, random, detached": "1; 2r",
    "exact": "1; 2",
    "sequence, truncated router": "d + r; 2r",
}


def count(shape: Shape, variant: str, ratio: float) -> dict[str, int]:
    """Operations of one forward and one backward for each row of the batch.

    Args:
        shape: Sizes; the batch is replaced by the fewest rows that the variant takes.
        variant: ``"standard"`` or one of ``_steps.VARIANTS``.
        ratio: Keep ratio.

    Returns:
        ``forward`` and ``backward``.
    """
    rows = 4 if variant.startswith("sequence") else 1  # this mode keeps at least one row
    shape = replace(shape, batch=rows)
    model, tokens = shape.model(), shape.tokens()
    model.set_attn_implementation("eager")
    head_gradients, forward = 0, standard_forward(model, tokens)
    if variant != "standard":
        forward = routed_forward(model, tokens, variant, ratio)
        kept = shape.length if rows > 1 else round(ratio * (shape.length - 1))
        head_gradients = 4 * kept * shape.hidden * shape.vocab
    forward().backward()  # the first step includes checks of the model
    with FlopCounterMode(display=False) as counter:
        loss = forward()
    forward_flops = counter.get_total_flops()
    with counter:
        loss.backward()
    return {
        "forward": (forward_flops - head_gradients) // rows,
        "backward": (counter.get_total_flops() + head_gradients) // rows,
    }


def standard_forward(model: Any, tokens: Tensor) -> Callable[[], Tensor]:
    """The loss of all tokens."""
    return lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss


def routed_forward(model: Any, tokens: Tensor, variant: str, ratio: float) -> Callable[[], Tensor]:
    """The loss of the kept tokens."""
    settings, routed = VARIANTS[variant]
    router = create_truncated_router(model) if routed else None
    wrapped = CGGRModel(model, router, min_tokens_ratio=ratio, seed=SEED, **settings).train()
    return lambda: wrapped(tokens, labels=tokens)


def main() -> None:
    """Count every variant of every shape; write the JSON and the plot, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the JSON and the plot")
    _record.add_seconds(parser)
    options = parser.parse_args()
    deadline = _record.deadline(options.seconds)
    here = torch.device(options.device).type
    if any(row.device_type == here and row.backend != "torch" for row in backends.report()):
        parser.error("operations inside kernels cannot be counted; run with CGGR_BACKEND=torch")
    shapes = {name: replace(SHAPES[name], device=options.device) for name in options.shapes}
    rows: dict[str, dict[str, Any]] = {}
    for name, shape in list(shapes.items()):
        if rows and _record.is_over(deadline):
            del shapes[name]
            continue
        standard = count(shape, "standard", options.ratio)
        rows[f"{name}: standard"] = standard | _single(1.0)
        for variant in VARIANTS:
            counted = count(shape, variant, options.ratio)
            total = sum(counted.values()) / sum(standard.values())
            shares = {f"{part}_share": counted[part] / standard[part] for part in standard}
            rows[f"{name}: {variant}"] = counted | shares | _single(total) | {"theory": THEORY[variant]}
            told = " ".join(f"{part} {share:.3f}" for part, share in shares.items())
            print(f"{name:5} {variant:42} {told}", flush=True)
    settings = {name: shape.settings() for name, shape in shapes.items()}
    settings |= {"ratio": options.ratio, "seed": SEED}
    control = next(iter(rows))
    name = "_".join(["step_flops", *(shapes if len(shapes) < len(SHAPES) else [])])
    path = _record.write(name, rows, settings=settings, control=control, folder=options.output)
    _draw(rows, list(shapes), options.ratio).savefig(path.with_suffix(".png"), dpi=150)


def _single(value: float) -> dict[str, Any]:
    return _record.summary([value]) | {"unit": "share of the standard step's operations"}


def _draw(rows: dict[str, dict[str, Any]], shapes: list[str], ratio: float) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, part in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
        for offset, name in enumerate(shapes):
            shares = [rows[f"{name}: {variant}"][f"{part}_share"] for variant in VARIANTS]
            places = [place + 0.27 * (offset - 1) for place in range(len(VARIANTS))]
            axes.barh(places, shares, height=0.25, label=name)
        axes.axvline(1.0 if part == "forward" else ratio, color="0.4", linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(VARIANTS)), list(VARIANTS))
        axes.set_title(f"{part} pass, share of the standard step's", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, title="shape", title_fontsize=8)
    return figure


if __name__ == "__main__":
    main()
