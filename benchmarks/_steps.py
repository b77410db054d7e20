"""The training steps whose time and memory are measured: standard, compiled, and every gradient mode and engine."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks._random_model import SEED, random_model
from cggr_core import CGGRModel, Selection, create_truncated_router, linear_token_statistics, score, select
from cggr_core.routing import fused_forwards, replaced_forwards, whole_rows

# On a GPU, a training loop queues the next step while the last one runs; a sample is this many consecutive steps.
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
    # Whether the step is launch-bound, so that users would capture it as a graph.
    launch_bound: bool = False

    def model(self) -> Any:
        """A Llama of these sizes with random weights."""
        return random_model(
            "llama", layers=self.layers, hidden=self.hidden, intermediate=self.intermediate, heads=self.heads,
            kv_heads=self.kv_heads, vocab=self.vocab, longest=self.length, dtype=self.dtype, device=self.device,
            tied=self.tied,
        )  # fmt: skip

    def tokens(self) -> Tensor:
        """Random token ids ``[B, S]``."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.randint(0, self.vocab, (self.batch, self.length), generator=generator).to(self.device)

    def settings(self) -> dict[str, Any]:
        """The settings in a result."""
        return {key: str(value) if isinstance(value, torch.dtype) else value for key, value in vars(self).items()}


SHAPES = {
    "cpu": Shape(8, 384, 1024, 6, 2, 8192, 8, 512, torch.float32, "cpu"),
    "1b": Shape(16, 2048, 8192, 32, 8, 128256, 8, 2048, torch.bfloat16, "cuda"),
    # Eight layers of Llama-3-8B's sizes; its head is as wide as the 1B model's.
    "8b": Shape(8, 4096, 14336, 32, 8, 128256, 4, 2048, torch.bfloat16, "cuda", tied=False),
    "135m": Shape(30, 576, 1536, 9, 3, 49152, 8, 2048, torch.bfloat16, "cuda", launch_bound=True),
}
# Variant -> (settings of CGGRModel, whether a truncated router scores). The bars concern the first three.
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
# Tokens without a gradient run in FP8.
LOW = ", fp8 context"
# Only the head's product that scores are made from runs in FP8.
LOW_SCORES = ", fp8 scores"
# Kept tokens reuse what linear layers made of them in the context pass.
REUSED = ", outputs reused"
# The routed passes run norms, rotary embeddings and gated activations in fused ops; this is the standard step with
# those alone changed.
FUSED = "standard, fused layers"
# The default of TRL's trainers: every layer's activations are recomputed in the backward pass.
CHECKPOINTED = "standard, checkpointed"
CHECKPOINTED_FUSED = "standard, checkpointed, fused layers"
# Labels on the last tenth of every row only, as in fine-tuning on answers: other tokens are not trained on.
SUPERVISED_SHARE = 0.1
SUPERVISED = ", 10% supervised"
# The number of slots is given, so that no step reads it from the device.
GIVEN = ", slots given"
COMPILED = ", compiled parts"
GRAPH = ", one CUDA graph"
# With an attention mask, as from a tokenizer; nothing is padded, so the work is the same.
MASKED = ", attention mask"
# What CGGRModel(cuda_graph="auto") does for its user.
RECORDED = ", recorded by itself"


def standard_step(model: nn.Module, tokens: Tensor, labels: Tensor | None = None, **inputs: Any) -> Callable[[], None]:
    """The ordinary training step."""
    labels = tokens if labels is None else labels

    def step() -> None:
        model(input_ids=tokens, labels=labels, use_cache=False, **inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def checkpointed(model: nn.Module) -> nn.Module:
    """A copy of the model with gradient checkpointing, as transformers does it.

    Switching it on and off on the model itself would recompile the compiled control in every round.
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
    """``kv`` on the labelled tokens; ``given`` is their number, else read from the device in every step."""
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
    """A copy whose norms and MLPs are compiled; routing leaves those unchanged."""
    model = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name.endswith(("norm", ".mlp")):
            module.compile(dynamic=False)
    return model


class GraphStep:
    """A step captured as one CUDA graph, without launches from the host.

    Args:
        step: The step, gradients released at its end.
        model: The model whose gradients the replays write.
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
        self._step = step  # its inputs must outlive the graph
        # A replay allocates nothing: the memory of the graph is what its capture took.
        self.peak_extra_bytes = torch.cuda.max_memory_allocated() - before

    def __call__(self) -> None:
        """Replay."""
        self._graph.replay()


class RecordedByItself:
    """A step that CGGRModel records by itself, after a few eager ones.

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
        # The memory of the recording, and the gradients that a replay returns.
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
    inputs = {"attention_mask": torch.ones_like(tokens)} if variant.endswith(MASKED) else {}
    variant = variant.removesuffix(MASKED)
    plain, labels = variant.removesuffix(SUPERVISED), end_labels(tokens) if variant.endswith(SUPERVISED) else None
    if plain in ("standard", "standard, compiled"):
        return standard_step(model if plain == "standard" else torch.compile(model), tokens, labels, **inputs)
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
    more["reuse_outputs"], variant = variant.endswith(REUSED), variant.removesuffix(REUSED)
    more["score_precision"] = "fp8" if variant.endswith(LOW_SCORES) else None
    variant = variant.removesuffix(LOW_SCORES)
    if variant.removesuffix(GIVEN) == "kv" + SUPERVISED:
        step = supervised_step(model, tokens, given=variant.endswith(GIVEN), **more)
    else:
        step = cggr_step(model, tokens, variant, ratio, inputs, **more)
    return RecordedByItself(step) if recorded else step


def scoring_step(model: nn.Module, tokens: Tensor, ratio: float) -> Callable[[], None]:
    """Statistics of all tokens from hidden states, scores and selection: the cost of choosing tokens."""
    head = model.get_output_embeddings().weight
    hidden = torch.randn(*tokens.shape, model.config.hidden_size, device=tokens.device).to(model.dtype)
    targets = tokens.roll(-1, 1)
    countable = torch.ones_like(tokens, dtype=torch.bool)

    def step() -> None:
        statistics = linear_token_statistics(hidden, head, targets, fields={"gradnorm"})
        select(score(statistics, scoring="gradnorm"), countable, ratio=ratio)

    return step


def variants_of(shape: Shape) -> list[str]:
    """The rows of a shape's table besides the standard step, those with bars first."""
    main_variants = list(VARIANTS)[:3]
    compiled = ["standard, compiled", *(name + COMPILED for name in main_variants[:2])]
    graphs = [name + GRAPH for name in ("standard", *main_variants[:2], *compiled[1:])]
    recorded = [name + RECORDED for name in main_variants]
    supervised = [name + SUPERVISED for name in ("standard", FUSED, CHECKPOINTED, CHECKPOINTED_FUSED, "kv")]
    cuda = shape.device == "cuda"
    # On small models FP8 gains nothing: products are a small part of their time.
    low = [name + LOW for name in (*main_variants, "kv" + SUPERVISED, *list(VARIANTS)[4:7])]
    slots = "kv" + SUPERVISED + GIVEN
    # Every recording holds the memory of its step, so the largest models get only a few.
    by_themselves = [name + RECORDED for name in (main_variants[2], *low[1:3])]
    by_themselves += [slots, slots + LOW, slots + GRAPH, slots + LOW + GRAPH]
    by_themselves += ["kv" + SUPERVISED + LOW + RECORDED]
    controls = ["kv" + SUPERVISED + RECORDED, "standard, compiled" + SUPERVISED]
    return [
        FUSED,
        CHECKPOINTED,
        *main_variants,
        *(name + scores + REUSED for scores in ("", LOW_SCORES) for name in main_variants[:2]),
        *([*low[:4], *by_themselves] if cuda and not shape.launch_bound else []),
        *supervised,
        *(controls if cuda else []),
        *(compiled if cuda else []),
        CHECKPOINTED_FUSED,
        *(low[4:] if cuda and not shape.launch_bound else []),
        *([*graphs, *recorded] if shape.launch_bound else []),
        *(name + MASKED for name in ("standard", main_variants[0], main_variants[2])),
        *list(VARIANTS)[3:],
    ]
