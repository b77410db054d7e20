"""Time and memory of a training step of a Mixtral: transformers' experts, compiled, and this project's, routed and not.

``python -m benchmarks.moe_step gpu`` (one CUDA device, about three minutes), ``... cpu`` (tiny, to try it). A step is
forward, loss with the auxiliary loss of the routers, and backward. All arms have the same weights and random tokens;
``grouped_mm`` is the default of transformers. Routed steps keep a quarter of the tokens: the others also go through the
experts, but save nothing for the backward pass. On CUDA they are measured as CGGRModel records them by itself, and once
without. The auxiliary loss of transformers before 5.23 waits for the device in every layer, which no recording can; all
arms count the chosen experts without waiting, as later versions do.
"""

import argparse
import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks import _record
from benchmarks._random_model import SEED
from benchmarks._steps import STEPS_IN_A_ROW, RecordedByItself, fused_step
from benchmarks.step_time import peak_on_device
from cggr_core import CGGRModel
from cggr_moe import register_experts

CONTROL = "standard, grouped_mm"
COMPILED = "standard, grouped_mm, compiled"
FUSED = ", fused layers"
EAGER = ", not recorded"
ROUTED: dict[str, dict[str, Any]] = {
    "interleaved, random": {"selection": "random"},
    "two passes, full-depth scores": {},
}
RATIO = 0.25
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {
        "layers": 2, "hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "vocab": 256, "experts": 4,
        "batch": 2, "length": 64, "dtype": torch.float32, "device": "cpu",
    },
    "gpu": {
        "layers": 12, "hidden": 1024, "intermediate": 3584, "heads": 16, "kv_heads": 4, "vocab": 32000, "experts": 8,
        "batch": 8, "length": 2048, "dtype": torch.bfloat16, "device": "cuda",
    },
}  # fmt: skip


def make_model(shape: dict[str, Any], implementation: str) -> MixtralForCausalLM:
    """A Mixtral of these sizes with random weights, the same for every implementation of its experts."""
    torch.manual_seed(SEED)
    config = MixtralConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        num_local_experts=shape["experts"],
        num_experts_per_tok=2,
        max_position_embeddings=shape["length"],
        output_router_logits=True,
    )
    with torch.device(shape["device"]):
        model = MixtralForCausalLM(config).to(shape["dtype"]).train()
    model.set_experts_implementation(implementation)
    return model


def count_without_waiting(index: Tensor, minlength: int) -> Tensor:
    """``torch.bincount`` for numbers below ``minlength``; it does not look for the largest on the host."""
    return torch.zeros(minlength, dtype=torch.long, device=index.device).scatter_add(0, index, torch.ones_like(index))


def make_step(call: Callable[[], Any], model: torch.nn.Module) -> Callable[[], None]:
    """Forward, backward, gradients released."""

    def step() -> None:
        call().backward()
        model.zero_grad(set_to_none=True)

    return step


def make_steps(shape: dict[str, Any], tokens: Tensor) -> dict[str, Callable[[], None]]:
    """The step of every arm; the compiled one last, since it may take all the remaining time."""
    steps: dict[str, Callable[[], None]] = {}
    compiled: dict[str, Callable[[], None]] = {}
    for implementation in ("grouped_mm", register_experts()):
        model = make_model(shape, implementation)

        def standard(model: Any = model) -> Tensor:
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

        plain = steps[f"standard, {implementation}"] = make_step(standard, model)
        if implementation != "grouped_mm":
            # The routed passes fuse the layers' elementwise work: the control with those ops alone changed.
            steps[f"standard, {implementation}{FUSED}"] = fused_step(model, plain)
        if implementation == "grouped_mm" and shape["device"] == "cuda":
            copied: Any = torch.compile(copy.deepcopy(model))
            compiled[COMPILED] = make_step(lambda copied=copied, standard=standard: standard(copied), copied)
        for name, settings in ROUTED.items():
            routed = CGGRModel(model, gradient="kv", min_tokens_ratio=RATIO, seed=SEED, **settings).train()
            steps[f"{name}, {implementation}"] = make_step(lambda routed=routed: routed(tokens, labels=tokens), model)
            if implementation != "grouped_mm":
                eager = CGGRModel(
                    model, gradient="kv", min_tokens_ratio=RATIO, seed=SEED, cuda_graph=False, **settings
                ).train()
                steps[f"{name}, {implementation}{EAGER}"] = make_step(
                    lambda eager=eager: eager(tokens, labels=tokens), model
                )
    return steps | compiled


def main() -> None:
    """Run one shape and write its JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the result")
    _record.add_seconds(parser)
    options = parser.parse_args()
    until = _record.deadline(options.seconds)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # why a step is not recorded
    torch.bincount = count_without_waiting
    shape, cuda = SHAPES[options.shape], SHAPES[options.shape]["device"] == "cuda"
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, shape["vocab"], (shape["batch"], shape["length"]), generator=generator)
    tokens = tokens.to(shape["device"])
    steps = make_steps(shape, tokens)
    calls = STEPS_IN_A_ROW if cuda else 1
    timing = {"rounds": options.rounds, "deadline": until, "calls": calls}
    ready: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name, step in steps.items():
        if ready and _record.is_over(until):
            left_out[name] = "time was up"
            continue
        try:
            step()
            if cuda and name.startswith(tuple(ROUTED)) and not name.endswith(EAGER):
                step = RecordedByItself(step)
                peaks[name] = step.peak_extra_bytes
            elif cuda:
                peaks[name] = peak_on_device(step)
        except RuntimeError as error:  # out of memory, or cannot be compiled here: continue with the others
            left_out[name] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        ready[name] = step
        print(f"{name}: ready", flush=True)
        if len(ready) == len(steps) - 1 and cuda:
            # Write before the compiled step, which may be interrupted.
            write(shape, _record.measure_until(ready, control=CONTROL, device="cuda", **timing), peaks, {}, options)
    rows = _record.measure_until(ready, control=CONTROL, device=shape["device"], **timing)
    write(shape, rows, peaks, left_out, options)


def write(
    shape: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    peaks: dict[str, int],
    left_out: dict[str, str],
    options: argparse.Namespace,
) -> None:
    """Write the JSON and the plot, and print the table."""
    for name, peak in peaks.items():
        rows[name]["peak_extra_bytes"] = peak
    calls = STEPS_IN_A_ROW if shape["device"] == "cuda" else 1
    settings = {**shape, "dtype": str(shape["dtype"]), "ratio": RATIO, "seed": SEED, "steps_in_a_row": calls}
    settings["left_out"] = left_out
    where = {"control": CONTROL, "device": shape["device"], "folder": options.output}
    name = f"moe_step_{options.shape}"
    path = _record.write(name, rows, settings=settings, **where)
    _record.plot(_record.load(name, folder=options.output), path.with_suffix(".png"), label="seconds per step")
    for row, numbers in rows.items():
        peak = numbers.get("peak_extra_bytes", 0) / 1e9
        print(f"{row:45} {numbers['median'] * 1e3:9.1f} ms {numbers['ratio']['median']:6.2f}x {peak:8.2f} GB")


if __name__ == "__main__":
    main()
