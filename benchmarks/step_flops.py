"""Floating-point operations of a training step, beside what the table of gradient modes promises.

``python -m benchmarks.step_flops`` counts the shapes of ``step_time`` on the meta device: nothing is computed, so any
machine can, and the ops are the plain-torch ones, whose products are seen. Attention is eager for the same reason; it
is uncut by causality in all variants alike. The loss makes the gradients of the head during the forward; those two are
counted with the backward pass, where they belong.
"""

import argparse
from dataclasses import replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import _record
from benchmarks.step_time import SEED, SHAPES, VARIANTS, Shape
from cggr_core import CGGRModel, create_truncated_router
from cggr_core.routing.architectures import describe
from cggr_core.routing.probe import Probe

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
        shape: Sizes; the batch is replaced by the least rows that the variant needs.
        variant: ``"standard"`` or one of ``step_time.VARIANTS``.
        ratio: Keep ratio.

    Returns:
        ``forward`` and ``backward``.
    """
    rows = 4 if variant.startswith("sequence") else 1  # a row is the least that this mode can keep
    shape = replace(shape, batch=rows, device="meta")
    model, tokens = shape.model(), torch.empty(rows, shape.length, dtype=torch.int64, device="meta")
    model.set_attn_implementation("eager")
    # All ones: without a mask, transformers looks for packed documents, which takes values.
    inputs = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    head_gradients = 0
    if variant == "standard":

        def forward() -> Tensor:
            return model(**inputs, use_cache=False).loss

    else:
        wrapped = _wrapped(model, shape, variant, ratio)
        kept = shape.length if rows > 1 else round(ratio * (shape.length - 1))
        head_gradients = 4 * kept * shape.hidden * shape.vocab

        def forward() -> Tensor:
            return wrapped(**inputs)

    with FlopCounterMode(display=False) as counter:
        loss = forward()
    forward_flops = counter.get_total_flops()
    with counter:
        loss.backward()
    return {
        "forward": (forward_flops - head_gradients) // rows,
        "backward": (counter.get_total_flops() + head_gradients) // rows,
    }


def _wrapped(model: nn.Module, shape: Shape, variant: str, ratio: float) -> CGGRModel:
    settings, routed = VARIANTS[variant]
    router = create_truncated_router(model, max(1, shape.layers // 8)) if routed else None
    wrapped = CGGRModel(model, router, min_tokens_ratio=ratio, seed=SEED, **settings).train()
    # The look at the model before the first step reads values, and there are none here: its result is what a Llama
    # gives, whose layers return their hidden state and whose head is one matrix.
    seen = Probe(describe(model), lambda hidden: hidden)
    for engine in (wrapped._passes, *([router.engine] if router is not None else [])):
        engine._probe, engine._probed = seen, {"plain", "routing"}
    wrapped._watch = lambda *_: None
    return wrapped


def main() -> None:
    """Count every variant of every shape; write the JSON and the plot, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratio", type=float, default=0.25)
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for name, shape in SHAPES.items():
        standard = count(shape, "standard", options.ratio)
        rows[f"{name}: standard"] = standard | _single(1.0)
        for variant in VARIANTS:
            counted = count(shape, variant, options.ratio)
            total = sum(counted.values()) / sum(standard.values())
            shares = {f"{part}_share": counted[part] / standard[part] for part in standard}
            rows[f"{name}: {variant}"] = counted | shares | _single(total) | {"theory": THEORY[variant]}
            print(f"{name:5} {variant:42} " + " ".join(f"{part} {share:.3f}" for part, share in shares.items()))
    settings = {name: shape.settings() for name, shape in SHAPES.items()}
    settings |= {"ratio": options.ratio, "seed": SEED}
    path = _record.write("step_flops", rows, settings=settings, control="1b: standard")
    _draw(rows, options.ratio).savefig(path.with_suffix(".png"), dpi=150)


def _single(value: float) -> dict[str, Any]:
    return _record.summary([value]) | {"unit": "share of the standard step's operations"}


def _draw(rows: dict[str, dict[str, Any]], ratio: float) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, part in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
        for offset, name in enumerate(SHAPES):
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
