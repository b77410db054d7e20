"""Time and memory of a policy-gradient step: log-probabilities computed in the usual ways, and with routed gradients.

``python -m benchmarks.routed_logprobs --preset cpu`` (two cores, minutes), ``--preset 1b``, ``--preset qwen05b`` (one
CUDA device). A step is forward, loss and backward of ``-mean(advantage * logprob)`` over the kept tokens; the
optimizer's share is the same for all and left out. Random token ids, random weights.

Task ``rows``: whole rows, with the kept tokens at the end, as when most of a row is prompt or tool output. Tasks
``pP_gG``: G completions of each prompt of P tokens, a random share of their tokens kept; the prompt repeated before
every completion, or shared. Controls: log-softmax over all logits; a head on the kept rows only, as TRL's
``fused_lm_head``; both with Hugging Face's gradient checkpointing. Variants that do not fit in memory are named in the
result's settings.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import _record
from benchmarks._random_model import SEED, random_model
from benchmarks.step_time import resident_bytes
from cggr_core import SharedContext, routed_logprobs
from cggr_core.logprobs import linear_logprobs

Step = Callable[[], None]


@dataclass(frozen=True)
class Preset:
    """Sizes of a model and of its training data."""

    config: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    dtype: torch.dtype
    device: str
    batch: int
    length: int
    ratio: float
    prompts: int
    completion: int
    completion_ratio: float
    groups: tuple[tuple[int, int], ...]

    def model(self) -> PreTrainedModel:
        """A model of these sizes with random weights."""
        longest = max(self.length, *(prompt + self.completion for prompt, _ in self.groups))
        return random_model(
            self.config, layers=self.layers, hidden=self.hidden, intermediate=self.intermediate, heads=self.heads,
            kv_heads=self.kv_heads, vocab=self.vocab, longest=longest, dtype=self.dtype, device=self.device,
        )  # fmt: skip

    def tasks(self) -> list[str]:
        """Names of the tasks."""
        return ["rows", *(f"p{prompt}_g{group}" for prompt, group in self.groups)]


PRESETS = {
    "cpu": Preset(
        *("llama", 6, 256, 704, 4, 2, 4096, torch.float32, "cpu"),
        *(4, 512, 0.1, 1, 64, 0.2, ((64, 4), (256, 4), (256, 8))),
    ),
    "1b": Preset(
        *("llama", 16, 2048, 8192, 32, 8, 128256, torch.bfloat16, "cuda"),
        *(2, 8192, 0.1, 2, 1024, 0.2, ((512, 8), (512, 16), (4096, 8), (4096, 16))),
    ),
    "qwen05b": Preset(
        *("qwen2", 24, 896, 4864, 14, 2, 151936, torch.bfloat16, "cuda"),
        *(2, 8192, 0.1, 2, 1024, 0.2, ((512, 8), (512, 16), (4096, 8), (4096, 16))),
    ),
}


@dataclass(frozen=True)
class Batch:
    """Tokens of a task in repeated form, and the part that is shared."""

    input_ids: Tensor
    keep: Tensor
    advantages: Tensor
    prompts: Tensor | None

    @property
    def before(self) -> int:
        """Tokens of a shared context: the prompt's last token belongs to the rows."""
        return 0 if self.prompts is None else self.prompts.shape[1] - 1


def make_batch(preset: Preset, task: str) -> Batch:
    """The tokens of a task."""
    generator = torch.Generator().manual_seed(SEED)

    def tokens(*shape: int) -> Tensor:
        return torch.randint(0, preset.vocab, shape, generator=generator)

    prompts = None
    if task == "rows":
        input_ids = tokens(preset.batch, preset.length)
        keep = (torch.arange(preset.length) >= round((1 - preset.ratio) * preset.length)).expand_as(input_ids).clone()
    else:
        prompt, group = (int(part[1:]) for part in task.split("_"))
        prompts = tokens(preset.prompts, prompt)
        completions = tokens(preset.prompts * group, preset.completion)
        input_ids = torch.cat([prompts.repeat_interleave(group, dim=0), completions], dim=1)
        keep = torch.rand(input_ids.shape, generator=generator) < preset.completion_ratio
        keep[:, : prompt - 1] = False
    keep[:, -1] = False
    advantages = torch.randn(input_ids.shape[0], 1, generator=generator)
    return Batch(*(None if part is None else part.to(preset.device) for part in (input_ids, keep, advantages, prompts)))


def loss_of(logprob: Tensor, keep: Tensor, advantages: Tensor) -> Tensor:
    """``-mean(advantage * logprob)`` over the kept tokens."""
    return -(advantages * logprob * keep).sum() / keep.sum()


def log_softmax_step(model: PreTrainedModel, batch: Batch) -> None:
    """Logits of all tokens, and their log-softmax in float32."""
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[:, :-1]
    logprobs = logits.float().log_softmax(-1)
    logprob = logprobs.gather(2, batch.input_ids[:, 1:, None])[:, :, 0]
    loss_of(logprob, batch.keep[:, :-1], batch.advantages).backward()


def head_on_kept_step(model: PreTrainedModel, batch: Batch) -> None:
    """The layers for all tokens, the head for the kept ones in chunks."""
    hidden = model.get_decoder()(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    targets = batch.input_ids.roll(-1, 1)[batch.keep]
    logprob, _ = linear_logprobs(hidden[batch.keep], model.get_output_embeddings().weight, targets)
    advantages = batch.advantages.expand_as(batch.keep)[batch.keep]
    (-(advantages * logprob).sum() / batch.keep.sum()).backward()


def routed_step(model: PreTrainedModel, batch: Batch, *, shared: bool = False, **settings: Any) -> None:
    """Routed gradients, with the prompt repeated or shared."""
    start = batch.before if shared else 0
    context = SharedContext(batch.prompts[:, :-1]) if shared and batch.prompts is not None else None
    keep = batch.keep[:, start:]
    found = routed_logprobs(model, batch.input_ids[:, start:], keep=keep, context=context, **settings)
    loss_of(found.logprob, keep, batch.advantages).backward()


@contextmanager
def checkpointed(model: PreTrainedModel):
    """Hugging Face's gradient checkpointing, which TRL switches on by default."""
    new = hasattr(model, "activation_checkpointing_enable")  # transformers 5.20
    kind = "activation" if new else "gradient"
    getattr(model, f"{kind}_checkpointing_enable")(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": False}})
    try:
        yield
    finally:
        getattr(model, f"{kind}_checkpointing_disable")()


CONTROL = "head on kept tokens, checkpointed"
STANDARD: dict[str, tuple[Callable[..., None], dict[str, Any], bool]] = {
    CONTROL: (head_on_kept_step, {}, True),
    "head on kept tokens": (head_on_kept_step, {}, False),
    "log-softmax, checkpointed": (log_softmax_step, {}, True),
    "log-softmax": (log_softmax_step, {}, False),
}
ROUTED: dict[str, tuple[Callable[..., None], dict[str, Any], bool]] = {
    "exact": (routed_step, {"gradient_mode": "exact"}, False),
    "kv": (routed_step, {"gradient_mode": "kv"}, False),
    "kv, with entropies": (routed_step, {"gradient_mode": "kv", "entropy": True}, False),
    "kv, two passes": (routed_step, {"gradient_mode": "kv", "engine": "two_pass"}, False),
    "kv, all log-probabilities": (routed_step, {"gradient_mode": "kv", "everywhere": True}, False),
    "detached": (routed_step, {"gradient_mode": "detached"}, False),
}
SHARED: dict[str, tuple[Callable[..., None], dict[str, Any], bool]] = {
    "exact, shared prompt": (routed_step, {"gradient_mode": "exact", "shared": True}, False),
    "exact, shared prompt, checkpointed": (routed_step, {"gradient_mode": "exact", "shared": True}, True),
    "kv, shared prompt": (routed_step, {"gradient_mode": "kv", "shared": True}, False),
    "detached, shared prompt": (routed_step, {"gradient_mode": "detached", "shared": True}, False),
}


def variants(task: str) -> dict[str, tuple[Callable[..., None], dict[str, Any], bool]]:
    """The steps of a task."""
    if task == "rows":
        return STANDARD | ROUTED
    return STANDARD | {name: ROUTED[name] for name in ("kv", "detached")} | SHARED


def make_step(model: PreTrainedModel, batch: Batch, task: str, variant: str) -> Step:
    """A step of one variant; gradients are released at its end."""
    function, settings, recomputed = variants(task)[variant]

    def step() -> None:
        with checkpointed(model) if recomputed else nullcontext():
            function(model, batch, **settings)
        model.zero_grad(set_to_none=True)

    return step


def steps_that_fit(
    model: PreTrainedModel, batch: Batch, task: str, names: list[str]
) -> tuple[dict[str, Step], list[str]]:
    """The steps that fit in the device's memory, each run once, and the names of the others."""
    steps, too_large = {}, []
    for name in names:
        step = make_step(model, batch, task, name)
        try:
            step()
            steps[name] = step
        except torch.OutOfMemoryError:
            too_large.append(name)
        if too_large and too_large[-1] == name:  # outside the handler, which holds the failed step's tensors
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
    return steps, too_large


def peak_in_this_process(preset: Preset, task: str, variant: str) -> int:
    """Peak resident memory of two steps, above that of the process before them (Linux)."""
    model, batch = preset.model(), make_batch(preset, task)
    step = make_step(model, batch, task, variant)
    # A small step first, so that libraries and their buffers are loaded and not counted.
    few = Batch(batch.input_ids[:1, -8:], batch.keep[:1, -8:], batch.advantages[:1], None)
    make_step(model, few, "rows", "kv")()
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = resident_bytes("VmRSS")
    for _ in range(2):
        step()
    return resident_bytes("VmHWM") - before


def peak_in_fresh_process(arguments: list[str], task: str, variant: str) -> int:
    """:func:`peak_in_this_process` in a new process, where no other variant has used the allocator."""
    command = [sys.executable, "-m", "benchmarks.routed_logprobs", *arguments, "--peak-of", task, variant]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def run_task(preset: Preset, task: str, options: argparse.Namespace, sizes: list[str], deadline: float) -> None:
    """Measure one task, and write its JSON and plot."""
    model, batch = preset.model(), make_batch(preset, task)
    asked = variants(task) if options.only is None else [CONTROL, *options.only]
    names = [name for name in variants(task) if name in asked]
    steps, too_large = steps_that_fit(model, batch, task, names)
    if CONTROL not in steps:
        print(f"{task}: the control does not fit in memory; use fewer rows (--batch, --prompts)")
        return
    cuda = preset.device == "cuda"
    calls = {name: _record.PeakOf(step) for name, step in steps.items()} if cuda else steps
    rows = _record.measure_until(calls, control=CONTROL, deadline=deadline, rounds=options.rounds, device=preset.device)
    for name, call in calls.items():
        peak = call.peak if isinstance(call, _record.PeakOf) else peak_in_fresh_process(sizes, task, name)
        rows[name]["peak_extra_bytes"] = peak
    settings = asdict(preset) | {"dtype": str(preset.dtype), "groups": [list(pair) for pair in preset.groups]}
    settings |= {"seed": SEED, "task": task, "rows": batch.input_ids.shape[0], "row_length": batch.input_ids.shape[1]}
    settings |= {"kept": batch.keep.sum().item(), "out_of_memory": too_large}
    name = f"{options.name or 'routed_logprobs_' + options.preset}_{task}"
    path = _record.write(name, rows, settings=settings, control=CONTROL, device=preset.device, folder=options.output)
    result = _record.load(name, folder=options.output)
    _record.plot(result, path.with_suffix(".png"), label="seconds per step")
    report(result)


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    settings, control = result["settings"], result["rows"][CONTROL]
    print(
        f"{settings['task']}: {settings['rows']} x {settings['row_length']} tokens, {settings['kept']} kept", flush=True
    )
    print(f"{'':36} {'ms':>9} {'faster':>7} {'peak GB':>8} {'share':>6}")
    for name, row in result["rows"].items():
        share = row["peak_extra_bytes"] / control["peak_extra_bytes"]
        numbers = f"{row['median'] * 1e3:9.1f} {row['ratio']['median']:6.2f}x {row['peak_extra_bytes'] / 1e9:8.2f}"
        print(f"{name:36} {numbers} {share:6.2f}", flush=True)
    for name in settings["out_of_memory"]:
        print(f"{name:36} out of memory", flush=True)


def main() -> None:
    """Run the tasks of a preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--tasks", nargs="+", help="of the preset; all by default")
    parser.add_argument("--only", nargs="+", help="variants to run besides the control")
    parser.add_argument("--batch", type=int, help="rows of the task rows")
    parser.add_argument("--length", type=int, help="tokens of a row of the task rows")
    parser.add_argument("--ratio", type=float, help="kept share of a row of the task rows")
    parser.add_argument("--prompts", type=int, help="prompts of the tasks with groups")
    parser.add_argument("--completion", type=int, help="tokens of a completion")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after these, but not before three rounds"
    )
    parser.add_argument("--name", help="of the result files, before _TASK")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the results")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = ("batch", "length", "ratio", "prompts", "completion")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    preset = replace(PRESETS[options.preset], **given)
    if options.peak_of:
        print(peak_in_this_process(preset, *options.peak_of))
        return
    tasks = options.tasks or preset.tasks()
    unknown = sorted(set(tasks) - set(preset.tasks()))
    if unknown:
        parser.error(f"no task {', '.join(unknown)} in preset {options.preset}: {', '.join(preset.tasks())}")
    sizes = ["--preset", options.preset, *(part for name, value in given.items() for part in (f"--{name}", str(value)))]
    end = time.monotonic() + options.seconds
    for number, task in enumerate(tasks):
        now = time.monotonic()
        run_task(preset, task, options, sizes, now + (end - now) / (len(tasks) - number))


if __name__ == "__main__":
    main()
