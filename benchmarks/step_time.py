"""Time and memory of a training step: standard, compiled, and every gradient mode and engine.

``python -m benchmarks.step_time cpu`` (two cores, a few minutes), ``... 1b``, ``... 8b`` and ``... 135m`` (one CUDA
device; with ``CGGR_BACKEND=torch`` and a ``--name``, the same without kernels). A step is forward, loss and backward;
the optimizer's share is the same for all and left out. Random token ids, random weights.
"""

import argparse
import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import _record
from cggr_core import CGGRModel, Selection, create_truncated_router, linear_token_statistics, score, select
from cggr_core.routing import fused_forwards, replaced_forwards, whole_rows

SEED = 0
# On a GPU a training loop queues the next step while the last one runs; a sample is this many steps in a row.
STEPS_IN_A_ROW = 3
STEPS_BEFORE_RECORDED = 6


@dataclass(frozen=True)
class Shape:
    """Sizes of one benchmark."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    batch: int
    length: int
    dtype: torch.dtype
    device: str
    tied: bool = True
    # Whether the step is bound by launches, so that capturing it as a graph is what its users would do.
    launch_bound: bool = False

    def model(self) -> LlamaForCausalLM:
        """A Llama of these sizes with random weights."""
        torch.manual_seed(SEED)
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.length,
            tie_word_embeddings=self.tied,
        )
        with torch.device(self.device):
            return LlamaForCausalLM(config).to(self.dtype).train()

    def tokens(self) -> Tensor:
        """Random token ids ``[B, S]``."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(0, self.vocab, (self.batch, self.length), generator=generator).to(self.device)

    def settings(self) -> dict[str, Any]:
        """What a result notes of it."""
        return {key: str(value) if isinstance(value, torch.dtype) else value for key, value in vars(self).items()}


SHAPES = {
    "cpu": Shape(8, 384, 1024, 6, 2, 8192, 8, 512, torch.float32, "cpu"),
    "1b": Shape(16, 2048, 8192, 32, 8, 128256, 8, 2048, torch.bfloat16, "cuda"),
    # Eight layers of Llama-3-8B's sizes; its head is as wide as the 1B model's.
    "8b": Shape(8, 4096, 14336, 32, 8, 128256, 4, 2048, torch.bfloat16, "cuda", tied=False),
    "135m": Shape(30, 576, 1536, 9, 3, 49152, 8, 2048, torch.bfloat16, "cuda", launch_bound=True),
}
# Variant -> (settings of CGGRModel, whether a truncated router scores). The first three are what the bars are about.
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "two passes, full-depth scores, kv": ({"gradient": "kv"}, False),
    "interleaved, truncated router, kv": ({"gradient": "kv"}, True),
    "interleaved, random, kv": ({"gradient": "kv", "selection": "random"}, False),
    "two passes, random, kv": ({"gradient": "kv", "selection": "random", "engine": "two_pass"}, False),
    "two passes, full-depth scores, detached": ({"gradient": "detached"}, False),
    "interleaved, truncated router, detached": ({"gradient": "detached"}, True),
    "interleaved, random, detached": ({"gradient": "detached", "selection": "random"}, False),
    "exact": ({"gradient": "exact"}, False),
    "sequence, truncated router": ({"gradient": "sequence"}, True),
}
# Tokens that need no gradient in FP8.
LOW = ", fp8 context"
# The routed passes run norms, rotary embeddings and gated activations in fused ops; this is the standard step with
# those alone changed.
FUSED = "standard, fused layers"
# What TRL's trainers do unless told otherwise: every layer's activations are recomputed in the backward pass.
CHECKPOINTED = "standard, checkpointed"
CHECKPOINTED_FUSED = "standard, checkpointed, fused layers"
# Labels on the last tenth of every row alone, as in fine-tuning on answers: what the task leaves out is not trained on.
SUPERVISED_SHARE = 0.1
SUPERVISED = ", 10% supervised"
# The number of slots is known, and no step asks the device for it.
GIVEN = ", slots given"
COMPILED = ", compiled parts"
GRAPH = ", one CUDA graph"
# An attention mask is given, as tokenizers give one; nothing is padded, so that the work is the same.
MASKED = ", attention mask"
# What CGGRModel(cuda_graph="auto") does for its user.
RECORDED = ", recorded by itself"


def standard_step(model: nn.Module, tokens: Tensor, labels: Tensor | None = None, **inputs: Any) -> Callable[[], None]:
    """The step that people run today."""
    labels = tokens if labels is None else labels

    def step() -> None:
        model(input_ids=tokens, labels=labels, use_cache=False, **inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def checkpointed(model: nn.Module) -> nn.Module:
    """A copy of the model with gradient checkpointing, as transformers does it.

    Switched on and off on the model itself, it would make the compiled control compile anew in every round.
    """
    copied: Any = copy.deepcopy(model)
    copied.gradient_checkpointing_enable({"use_reentrant": False})
    return copied


def end_labels(tokens: Tensor) -> Tensor:
    """The tokens as labels at the end of every row, -100 before it."""
    labels = tokens.clone()
    labels[:, : round(tokens.shape[1] * (1 - SUPERVISED_SHARE))] = -100
    return labels


def supervised_step(model: nn.Module, tokens: Tensor, *, given: bool, **more: Any) -> Callable[[], None]:
    """``kv`` on the tokens that have a label; ``given`` says how many there are, else every step asks the device."""
    labels = end_labels(tokens)
    wrapped = CGGRModel(model, gradient="kv", selection="supervised", **more).train()
    inputs: dict[str, Any] = {"labels": labels}
    if given:
        predicts = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
        inputs["selection"] = Selection.from_mask(predicts, capacity=int(predicts.sum(1).max()))

    def step() -> None:
        wrapped(tokens, **inputs).backward()
        model.zero_grad(set_to_none=True)

    return step


def fused_step(model: nn.Module, standard: Callable[[], None]) -> Callable[[], None]:
    """A step of the model with the fused ops of the routed passes, forward and backward."""
    forwards = fused_forwards(model.modules())

    def step() -> None:
        with replaced_forwards(forwards):
            standard()

    return step


def cggr_step(
    model: nn.Module, tokens: Tensor, variant: str, ratio: float, inputs: dict[str, Tensor], **more: Any
) -> Callable[[], None]:
    """The step of one variant over the same model."""
    settings, routed = VARIANTS[variant]
    depth = max(1, model.config.num_hidden_layers // 8)
    router = create_truncated_router(model, depth) if routed else None
    wrapped = CGGRModel(model, router, min_tokens_ratio=ratio, seed=SEED, **settings, **more).train()

    def step() -> None:
        wrapped(tokens, labels=tokens, **inputs).backward()
        model.zero_grad(set_to_none=True)

    return step


def with_compiled_parts(model: nn.Module) -> nn.Module:
    """A copy whose norms and MLPs are compiled, which routing leaves as they are."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name.endswith(("norm", ".mlp")):
            module.compile(dynamic=False)
    return model


class GraphStep:
    """A step captured as one CUDA graph, which takes the host's launches out of it.

    Args:
        step: The step, gradients released at its end.
        model: Whose gradients the replays write.
    """

    def __init__(self, step: Callable[[], None], model: nn.Module) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._graph = torch.cuda.CUDAGraph()
        with whole_rows(), torch.cuda.graph(self._graph):
            step()
        self._step = step  # what it works on has to outlive the graph
        # A replay allocates nothing: the memory of the graph is what its capture took.
        self.peak_extra_bytes = torch.cuda.max_memory_allocated() - before

    def __call__(self) -> None:
        """Replay."""
        self._graph.replay()


class RecordedByItself:
    """A step that a CGGRModel records by itself, after a few that it takes as they are.

    Args:
        step: The step, gradients released at its end.
    """

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        for _ in range(STEPS_BEFORE_RECORDED):
            step()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_reserved() - before
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        step()
        # What the recording holds, and the gradients that a replay gives out.
        self.peak_extra_bytes = held + torch.cuda.max_memory_allocated() - allocated

    def __call__(self) -> None:
        """Take the step."""
        self._step()


def make_step(model: nn.Module, tokens: Tensor, variant: str, ratio: float) -> Callable[[], None]:
    """The step of a row of the table."""
    if variant.endswith(GRAPH):
        return GraphStep(make_step(model, tokens, variant.removesuffix(GRAPH), ratio), model)
    if variant.endswith(COMPILED):
        return make_step(with_compiled_parts(model), tokens, variant.removesuffix(COMPILED), ratio)
    if variant == "scoring and selection alone":
        return scoring_step(model, tokens, ratio)
    if variant == "standard, compiled":
        return standard_step(torch.compile(model), tokens)
    inputs = {"attention_mask": torch.ones_like(tokens)} if variant.endswith(MASKED) else {}
    variant = variant.removesuffix(MASKED)
    plain, labels = variant.removesuffix(SUPERVISED), end_labels(tokens) if variant.endswith(SUPERVISED) else None
    if plain == "standard":
        return standard_step(model, tokens, labels, **inputs)
    if plain == FUSED:
        return fused_step(model, standard_step(model, tokens, labels))
    if plain in (CHECKPOINTED, CHECKPOINTED_FUSED):
        copied = checkpointed(model)
        step = standard_step(copied, tokens, labels)
        return fused_step(copied, step) if plain == CHECKPOINTED_FUSED else step
    recorded, variant = variant.endswith(RECORDED), variant.removesuffix(RECORDED)
    more: dict[str, Any] = {"cuda_graph": "auto" if recorded else False}
    more["context_precision"] = "fp8" if variant.endswith(LOW) else None
    variant = variant.removesuffix(LOW)
    if variant.removesuffix(GIVEN) == "kv" + SUPERVISED:
        return supervised_step(model, tokens, given=variant.endswith(GIVEN), **more)
    step = cggr_step(model, tokens, variant, ratio, inputs, **more)
    return RecordedByItself(step) if recorded else step


def peak_on_device(step: Callable[[], None]) -> int:
    """Peak CUDA memory of two steps above what the model and its inputs hold."""
    if isinstance(step, GraphStep | RecordedByItself):
        return step.peak_extra_bytes
    step()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    step()
    return torch.cuda.max_memory_allocated() - before


def peak_in_this_process(shape: Shape, variant: str, ratio: float) -> int:
    """Peak resident memory of three steps above what the process held before them (Linux)."""
    model, tokens = shape.model(), shape.tokens()
    step = make_step(model, tokens, variant, ratio)
    # A small forward first, so that libraries and their buffers are loaded and not counted.
    model(input_ids=tokens[:1, :8], labels=tokens[:1, :8]).loss.backward()
    model.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from here
    before = resident_bytes("VmRSS")
    for _ in range(3):
        step()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """A memory field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory on a CPU is measured on Linux")


def peak_in_fresh_process(name: str, variant: str, ratio: float) -> int:
    """:func:`peak_in_this_process` where no other variant has touched the allocator."""
    command = [sys.executable, "-m", "benchmarks.step_time", name, "--ratio", str(ratio), "--peak-of", variant]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(output.split()[-1])


def scoring_step(model: nn.Module, tokens: Tensor, ratio: float) -> Callable[[], None]:
    """Statistics of all tokens from hidden states, scores and selection: what choosing costs besides the passes."""
    head = model.get_output_embeddings().weight
    hidden = torch.randn(*tokens.shape, model.config.hidden_size, device=tokens.device).to(model.dtype)
    targets = tokens.roll(-1, 1)
    countable = torch.ones_like(tokens, dtype=torch.bool)

    def step() -> None:
        statistics = linear_token_statistics(hidden, head, targets, fields={"gradnorm"})
        select(score(statistics, scoring="gradnorm"), countable, ratio=ratio)

    return step


def variants_of(shape: Shape) -> list[str]:
    """The rows of a shape's table besides the standard step, the ones that the bars are about first."""
    main_variants = list(VARIANTS)[:3]
    compiled = ["standard, compiled", *(name + COMPILED for name in main_variants[:2])]
    graphs = [name + GRAPH for name in ("standard", *main_variants[:2], *compiled[1:])]
    recorded = [name + RECORDED for name in main_variants]
    supervised = [name + SUPERVISED for name in ("standard", FUSED, CHECKPOINTED, CHECKPOINTED_FUSED, "kv")]
    cuda = shape.device == "cuda"
    # On small models FP8 gains nothing: their products are not what takes the time.
    low = [name + LOW for name in (*main_variants, "kv" + SUPERVISED, *list(VARIANTS)[4:7])]
    slots = "kv" + SUPERVISED + GIVEN
    # Every recording holds the memory of its step, so that the largest models have few of them.
    by_themselves = [*(name + RECORDED for name in low[1:3]), slots, slots + LOW, slots + LOW + GRAPH]
    return [
        FUSED,
        CHECKPOINTED,
        *main_variants,
        *([*low[:4], *by_themselves] if cuda and not shape.launch_bound else []),
        *supervised,
        *(compiled if cuda else []),
        CHECKPOINTED_FUSED,
        *(low[4:] if cuda and not shape.launch_bound else []),
        *([*graphs, *recorded] if shape.launch_bound else []),
        *(name + MASKED for name in ("standard", main_variants[0], main_variants[2])),
        *list(VARIANTS)[3:],
    ]


def prepared(
    model: nn.Module, tokens: Tensor, variants: list[str], ratio: float, deadline: float
) -> tuple[dict[str, Callable[[], None]], dict[str, int], dict[str, str]]:
    """The steps of the variants, each run a few times.

    Returns:
        The steps, their peaks of CUDA memory in bytes (none on a CPU), and why variants were left out.
    """
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name in variants:
        if _record.is_over(deadline):
            left_out[name] = "the time was over"
            continue
        try:
            step = make_step(model, tokens, name, ratio)
            if tokens.is_cuda:
                peaks[name] = peak_on_device(step)
            else:
                step()
        except RuntimeError as error:  # out of memory, or what cannot be compiled or recorded here: the others go on
            model.zero_grad(set_to_none=True)
            left_out[name] = f"{type(error).__name__}: {str(error)[:300]}"
            print(f"left out: {name}: {left_out[name]}", flush=True)
            if tokens.is_cuda:
                torch.cuda.empty_cache()
            continue
        steps[name] = step
        print(f"ready: {name}", flush=True)
    return steps, peaks, left_out


def main() -> None:
    """Run one shape and write its JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--name", help="of the result file")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the result")
    parser.add_argument("--only", nargs="*", help="variants to run besides the standard step")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    _record.add_seconds(parser)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    if options.peak_of:
        print(peak_in_this_process(shape, options.peak_of, options.ratio))
        return

    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what is recorded, and why what is not
    cuda = shape.device == "cuda"
    everything = variants_of(shape) if options.only is None else options.only
    model, tokens = shape.model(), shape.tokens()
    # Some of the time is for the rounds, whatever compilation takes.
    until, deadline = (_record.deadline(options.seconds and options.seconds * share) for share in (0.6, 1.0))
    names = ["standard", *everything, "scoring and selection alone"]
    steps, peaks, left_out = prepared(model, tokens, names, options.ratio, until)
    calls = STEPS_IN_A_ROW if cuda else 1
    rounds = {"rounds": options.rounds, "deadline": deadline, "calls": calls}
    rows = _record.measure_until(steps, control="standard", device=shape.device, **rounds)
    if not cuda:
        peaks = {
            name: peak_in_fresh_process(options.shape, name, options.ratio)
            for name in steps
            if not _record.is_over(deadline)
        }
    for name, peak in peaks.items():
        rows[name]["peak_extra_bytes"] = peak
    del model, steps
    settings = shape.settings() | {"ratio": options.ratio, "seed": SEED, "left_out": left_out}
    settings["steps_in_a_row"] = calls
    settings["backend"] = os.environ.get("CGGR_BACKEND", "auto")
    name = options.name or f"step_time_{options.shape}"
    where = {"control": "standard", "device": shape.device, "folder": options.output}
    path = _record.write(name, rows, settings=settings, **where)
    report(json.loads(path.read_text()))
    _record.plot(_record.load(name, folder=options.output), path.with_suffix(".png"), label="seconds per step")


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    control = result["rows"]["standard"]
    print(f"{'':50} {'ms':>8} {'faster':>7} {'peak GB':>8} {'share':>6}")
    for name, row in result["rows"].items():
        line = f"{name:50} {row['median'] * 1e3:8.1f} {row['ratio']['median']:6.2f}x"
        if "peak_extra_bytes" in row:
            share = row["peak_extra_bytes"] / control["peak_extra_bytes"]
            line += f" {row['peak_extra_bytes'] / 1e9:8.2f} {share:6.2f}"
        print(line)


if __name__ == "__main__":
    main()
