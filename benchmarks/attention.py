"""Tokens per second and memory of a 1B model on every attention backend that works on this machine.

The model has the sizes of Llama-3.2-1B and random weights, in bfloat16. ``forward`` runs all tokens without gradients
and computes the logits of the last position; ``forward + backward`` trains on all tokens, with a loss that needs no
logits tensor (cggr-core's) and without activation checkpointing. Each backend was set once by
``enable_flash_attention``, so its trial against eager attention has passed; ``sdpa`` is also pinned to each of its
kernels. Times are medians of CUDA events around single calls in turns; memory is the peak above what was allocated
before the call. Whatever could not be measured is listed in the settings with the reason.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import _record
from benchmarks._kernels import peak_bytes
from cggr_core import linear_cross_entropy
from cggr_flash import attention_backends, enable_flash_attention

Context = Callable[[], AbstractContextManager[Any]]
SEED = 0
SIZES = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
# The same heads, so that compiled kernels are reused.
TINY = SIZES | {"vocab_size": 512, "intermediate_size": 512, "num_hidden_layers": 1}
# Sequence length -> (batch, timed rounds)
SHAPES = {2048: (4, 5), 8192: (1, 5), 32768: (1, 3)}
PASSES = ("forward", "forward + backward")
PINNED = {
    "sdpa, cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa, flash": SDPBackend.FLASH_ATTENTION,
    "sdpa, memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa, math": SDPBackend.MATH,
}
CONTROL = "sdpa"


def build(sizes: dict[str, Any], device: str) -> LlamaForCausalLM:
    """A Llama of the given sizes with random weights."""
    torch.manual_seed(SEED)
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).train()


def step(model: LlamaForCausalLM, tokens: torch.Tensor, what: str) -> None:
    """One pass over ``tokens`` ``[B, S]``."""
    if what == "forward":
        with torch.no_grad():
            model(tokens, use_cache=False, logits_to_keep=1)
        return
    hidden = model.model(tokens, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    loss = linear_cross_entropy(hidden, model.lm_head.weight, tokens[:, 1:].flatten())
    loss.backward()
    model.zero_grad(set_to_none=True)


def candidates(model: LlamaForCausalLM, device: str, chosen: list[str] | None) -> dict[str, tuple[str, Context]]:
    """Name → backend and kernel context, for those that work here."""
    works = [row.name for row in attention_backends(device) if row.available]
    found: dict[str, tuple[str, Context]] = {}
    for name in works if chosen is None else chosen:
        if not name.startswith("sdpa/"):
            enable_flash_attention(model, name)
            found[name] = (name, nullcontext)
    for name, kernel in PINNED.items() if chosen is None else ():
        if name.replace(", ", "/") in works:
            found[name] = ("sdpa", partial(sdpa_kernel, kernel))
    return found


class Clock:
    """Seconds of a call, by CUDA events on a GPU, and its peak memory in bytes."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __call__(self, call: Callable[[], None]) -> float:
        """Seconds."""
        if not self.cuda:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak(self, call: Callable[[], None]) -> int:
        """Bytes above those allocated before the call; 0 if they cannot be counted."""
        if not self.cuda:
            call()
            return 0
        torch.cuda.empty_cache()
        return peak_bytes(call)


def measure(
    model: LlamaForCausalLM,
    length: int,
    batch: int,
    rounds: int,
    works: dict[str, tuple[str, Context]],
    not_measured: dict[str, str],
    deadline: float,
) -> Iterator[dict[str, dict[str, Any]]]:
    """The rows of one sequence length, yielded after every round of either pass until time is up."""
    clock = Clock(model.device.type)
    rows: dict[str, dict[str, Any]] = {}
    tokens = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
    model.set_attn_implementation(CONTROL)
    step(model, tokens, PASSES[0])  # libraries allocate their workspaces
    for what in PASSES:
        calls: dict[str, tuple[str, Callable[[], None]]] = {}
        peaks: dict[str, int] = {}
        for name, (backend, context) in works.items():

            def call(context: Context = context, what: str = what) -> None:
                with context():
                    step(model, tokens, what)

            label = f"{what}, {name}"
            model.set_attn_implementation(backend)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    peaks[name] = clock.peak(call)  # and the rest is compiled
                except torch.OutOfMemoryError:
                    not_measured[label] = "out of memory"
                except RuntimeError as error:
                    # torch warns with a reason for every kernel that it skipped.
                    reasons = [str(each.message).partition(" (Triggered")[0] for each in said]
                    not_measured[label] = " ".join([str(error), *reasons])
            if name in peaks:
                calls[name] = (backend, call)
            else:
                print(f"{label}, S {length}: {not_measured[label]}", flush=True)
                model.zero_grad(set_to_none=True)
                gc.collect()
                if clock.cuda:
                    torch.cuda.empty_cache()
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            if number and _record.is_over(deadline):
                break
            for name, (backend, call) in calls.items():
                model.set_attn_implementation(backend)
                seconds[name].append(clock(call))
            for name, samples in seconds.items():
                row = _record.summary(samples) | {"unit": "s"}
                row["ratio"] = _record.summary([c / s for c, s in zip(seconds[CONTROL], samples, strict=True)])
                row["tokens_per_second"] = batch * length / row["median"]
                row["peak_bytes"] = peaks[name]
                rows[f"{what}, {name}"] = row
            yield rows
        for name in calls:
            row = rows[f"{what}, {name}"]
            shown = f"{row['median'] * 1e3:9.2f} ms {row['tokens_per_second']:10.0f} tokens/s"
            print(f"{what:19s} S {length:6d} {name:24s} {shown} {peaks[name] / 1e9:7.2f} GB", flush=True)


def draw(results: dict[int, dict[str, Any]], path: Path) -> None:
    """Tokens per second of both passes and memory of the second, one row of panels per sequence length."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.split(", ", 1)[1] for result in results.values() for row in result["rows"]))
    figure = Figure(figsize=(11.5, 0.8 + 0.27 * len(names) * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 3, sharey=True, squeeze=False)
    for (length, result), line in zip(results.items(), panels, strict=True):
        for what, field, scale, unit, axes in (
            (PASSES[0], "tokens_per_second", 1e3, "thousand tokens/s", line[0]),
            (PASSES[1], "tokens_per_second", 1e3, "thousand tokens/s", line[1]),
            (PASSES[1], "peak_bytes", 1e9, "peak memory above the model, GB", line[2]),
        ):
            for place, name in enumerate(names):
                key = f"{what}, {name}"
                row = result["rows"].get(key)
                value = row[field] / scale if row else 0.0
                why = result["settings"]["not_measured"].get(key, "")
                short = why if why == "out of memory" else "does not run" if "kernel" in why else "not measured"
                text = f" {value:.3g}" if row else f" {short}"
                axes.barh(place, value, color="0.6" if name == CONTROL else "#2a6f97", height=0.65)
                axes.text(value, place, text, va="center", fontsize=7, color="black" if row else "0.45")
            axes.set_yticks(range(len(names)), names, fontsize=7)
            axes.margins(x=0.17)
            if not any(f"{what}, {name}" in result["rows"] for name in names):
                axes.set_xlim(0, 1)
            axes.tick_params(axis="x", labelsize=7)
            batch = result["settings"]["batch"]
            axes.set_title(f"{what}, {batch} x {length} tokens", fontsize=8, loc="left")
            axes.set_xlabel(unit, fontsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].invert_yaxis()
    device = next(iter(results.values()))["environment"]["device"]
    figure.suptitle(f"Attention backends, Llama-3.2-1B sizes in bfloat16, {device}", fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(SHAPES), help="sequence lengths")
    parser.add_argument("--rounds", type=int, help="timed rounds (by default fewer for longer sequences)")
    parser.add_argument("--backends", nargs="+", help="names of attention_backends() (by default all that work)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to check that everything runs")
    parser.add_argument("--folder", type=Path, default=_record.RESULTS)
    _record.add_seconds(parser)
    arguments = parser.parse_args()
    deadline = _record.deadline(arguments.seconds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(TINY if arguments.tiny else SIZES, device)
    shapes = {length: SHAPES.get(length, (1, 4)) for length in arguments.lengths}
    works = candidates(model, device, arguments.backends)
    for length, (batch, rounds) in shapes.items():
        if _record.is_over(deadline):
            print(f"S {length}: time is up", flush=True)
            continue
        rounds = arguments.rounds or rounds
        not_measured: dict[str, str] = {}
        settings = {
            "seed": SEED,
            "dtype": "bfloat16",
            "model": TINY if arguments.tiny else SIZES,
            "batch": batch,
            "sequence": length,
            "checkpointing": False,
            "loss": "cggr_core.linear_cross_entropy over all tokens, no logits tensor",
            "backends": {row.name: row.reason for row in attention_backends(device)},
            "not_measured": not_measured,
        }
        control = f"{PASSES[0]}, {CONTROL}"
        name = f"attention_{length}"
        for rows in measure(model, length, batch, rounds, works, not_measured, deadline):
            _record.write(name, rows, settings=settings, control=control, device=device, folder=arguments.folder)
    found = [length for length in SHAPES if (arguments.folder / f"attention_{length}.json").exists()]
    if found:
        results = {length: _record.load(f"attention_{length}", folder=arguments.folder) for length in found}
        draw(results, arguments.folder / "attention.png")


if __name__ == "__main__":
    main()
