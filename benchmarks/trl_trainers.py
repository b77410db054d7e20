"""Updates of TRL's trainers, routed and unmodified: SFT on long rows, GRPO on its high-entropy tokens, DPO's pairs.

``python -m benchmarks.trl_trainers cpu`` (two cores, a minute), ``... 1b 0.5b`` (one CUDA device, nothing else on the
host, which limits routed updates of small models), with ``--task`` for one of the tasks, ``--seconds`` for how long
each is timed and ``--briefly`` for only the rows of the tables. Needs ``trl``.

An update is the forwards and backward of TRL's own ``compute_loss`` over the micro-batches of one optimizer step,
without generation, rewards and the optimizer, which are the same for all. The control is the unmodified trainer, with
gradient checkpointing, which TRL switches on; the other plain row has it off. Prompts and completions are random
tokens, since the time does not depend on them; entropies are the model's own. ``keep`` in a row is the share of all
tokens that have a backward.

- ``sft``: rows of 8,192 tokens of which 10% are supervised, in four stretches, like an agent's turns. A routed
  micro-batch is three of TRL's.
- ``grpo``: 16 prompts with 8 completions of 1,024 tokens each, the top 20% by entropy; prompts of 512 and of 4,096. As
  in TRL, rows are shuffled over micro-batches; *groups together* keeps them in order, so that more of a micro-batch
  shares prompts. *entropies known* is the second iteration over a batch, or any with vLLM: the pass for the old
  log-probabilities has already computed them.
- ``dpo``: pairs of completions of 512 tokens on a prompt of 1,024, with the forward of a reference model.
"""

import argparse
import copy
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from benchmarks import _record
from benchmarks._random_model import SEED
from benchmarks._steps import Shape
from cggr_core.backends import has_fp8_products
from cggr_train import CGGRConfig, CGGRMixin
from cggr_train.tokenizer import train_tokenizer

CONTROL, PLAIN = "TRL, checkpointing", "TRL"
OTHER_BATCHES = ("CGGR, kv, twice the micro-batch", "CGGR, kv, groups together")
# Updates until a routed pass is captured: its shapes have to recur, and the first update also looks at the model.
MOST_FIRST = 6


@dataclass(frozen=True)
class Sizes:
    """The model, and the sizes of each task.

    ``plain`` and ``routed`` are tokens of a micro-batch: a routed one holds more in the same memory.
    """

    model: Shape
    sft: tuple[int, int]  # rows, tokens
    groups: int
    generations: int
    completion: int
    prompts: tuple[int, ...]
    pairs: tuple[int, int, int]  # pairs, prompt, completion
    plain: int
    routed: int


SIZES = {
    "cpu": Sizes(
        Shape(4, 128, 256, 4, 2, 1024, 0, 512, torch.float32, "cpu"),
        (6, 256), 4, 4, 64, (32, 128), (4, 64, 32), 512, 2048,
    ),
    "1b": Sizes(
        Shape(16, 2048, 8192, 32, 8, 128256, 0, 8192, torch.bfloat16, "cuda"),
        (6, 8192), 16, 8, 1024, (512, 4096), (8, 1024, 512), 16384, 49152,
    ),
    "0.5b": Sizes(
        Shape(24, 896, 4864, 14, 2, 151936, 0, 8192, torch.bfloat16, "cuda"),
        (6, 8192), 16, 8, 1024, (512, 4096), (8, 1024, 512), 16384, 49152,
    ),
}  # fmt: skip
# The bars of an update: over the checkpointed one and over the plain one.
BARS = {"sft": (3.5, 2.8), "grpo": (2.5, 1.9)}


class RoutedSFT(CGGRMixin, SFTTrainer):
    """SFT with the gradient of the supervised tokens only."""


class RoutedGRPO(CGGRMixin, GRPOTrainer):
    """GRPO with the gradient of the tokens in its loss only."""


class RoutedDPO(CGGRMixin, DPOTrainer):
    """DPO with the gradient of the completions only."""


@dataclass(frozen=True)
class Variant:
    """A trainer and its micro-batches."""

    trainer: Any
    batches: list[dict[str, Any]]
    checkpointing: bool = False


class Update:
    """The update of one variant."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self._kept: list[Tensor] = []

    def __call__(self) -> None:
        """Forwards and backward of every micro-batch."""
        trainer, model = self.variant.trainer, self.variant.trainer.model
        if self.variant.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        task = getattr(trainer, "_task_loss", None)
        self._kept.clear()
        for batch in self.variant.batches:
            trainer.compute_loss(model, dict(batch)).backward()
            if task is not None:
                self._kept.append(task.metrics["kept_tokens"])
        model.zero_grad(set_to_none=True)
        if self.variant.checkpointing:
            model.gradient_checkpointing_disable()

    @property
    def captured(self) -> str:
        """Whether the last pass was a replayed CUDA graph, or why it was not."""
        task = getattr(self.variant.trainer, "_task_loss", None)
        recorder = None if task is None else task.forward().runs.recorder
        if recorder is None:
            return "no"
        return "replayed" if recorder.replayed else recorder.reason or "no"

    def kept(self) -> float:
        """Share of all tokens that had a backward in every layer of the last update."""
        if not self._kept:
            return 1.0
        total = 0
        for batch in self.variant.batches:
            tokens = batch["input_ids"] if "input_ids" in batch else (batch["prompt_ids"], batch["completion_ids"])
            total += tokens.numel() if isinstance(tokens, Tensor) else sum(part.numel() for part in tokens)
        return sum(int(kept) for kept in self._kept) / total


def tokens_of(shape: Shape, *sizes: int) -> Tensor:
    """Random token ids, past the special ones."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(3, shape.vocab, sizes, generator=generator).to(shape.device)


@contextmanager
def trainers(
    sizes: Sizes, model: Any, plain: Any, routed: Any, config: Any, *cggr: CGGRConfig, **values: Any
) -> Iterator[list[Any]]:
    """The same trainer over the same model: unmodified, and routed with each of the configurations."""
    tokenizer = train_tokenizer(["def f(a):\n    return a\n" * 20], vocab_size=300)
    rows = [{"prompt": "def f(a):\n", "completion": "    return a\n", "chosen": "    1\n", "rejected": "    2\n"}] * 8
    columns = {SFTConfig: ["prompt", "completion"], GRPOConfig: ["prompt"], DPOConfig: ["prompt", "chosen", "rejected"]}
    data = Dataset.from_list([{name: row[name] for name in columns[config]} for row in rows])
    beside = {name: values.pop(name) for name in ("reward_funcs", "ref_model") if name in values}
    with tempfile.TemporaryDirectory() as folder:
        arguments = config(
            folder, report_to="none", bf16=False, use_cpu=sizes.model.device == "cpu", seed=SEED, disable_tqdm=True,
            **values,
        )  # fmt: skip
        made = []
        for kind, more in ((plain, {}), *((routed, {"cggr": one}) for one in cggr)):
            # Each trainer patches its model's forward, and has its own generation settings.
            made.append(kind(model, args=arguments, train_dataset=data, processing_class=tokenizer, **beside, **more))
            made[-1].model.train()
            made[-1].current_gradient_accumulation_steps = 1
        yield made


def split(batch: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    """Micro-batches of ``rows`` rows."""
    count = len(next(value for value in batch.values() if isinstance(value, Tensor) and value.dim()))
    return [
        {name: value[at : at + rows] if value.dim() else value for name, value in batch.items()}
        for at in range(0, count, rows)
    ]


@contextmanager
def sft(sizes: Sizes, model: Any, length: int) -> Iterator[dict[str, Variant]]:
    """Rows of which a tenth is supervised."""
    rows, _ = sizes.sft
    ids = tokens_of(sizes.model, rows, length)
    position = torch.arange(length, device=ids.device)
    supervised = position % (length // 4) >= round(length // 4 * 0.9)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.masked_fill(~supervised, -100),
    }  # fmt: skip
    configurations = [CGGRConfig(selection="supervised"), CGGRConfig(selection="supervised", cuda_graph="auto")]
    if has_fp8_products(ids.device):
        configurations.append(CGGRConfig(selection="supervised", context_precision="fp8"))
    with trainers(sizes, model, SFTTrainer, RoutedSFT, SFTConfig, *configurations, max_length=None) as made:
        plain, routed, captured, *fp8 = made
        few, many = (split(batch, max(1, tokens // length)) for tokens in (sizes.plain, sizes.routed))
        variants = {
            CONTROL: Variant(plain, few, checkpointing=True),
            PLAIN: Variant(plain, few),
            "CGGR, kv": Variant(routed, many),
            "CGGR, kv, captured": Variant(captured, many),
            "CGGR, kv, TRL's micro-batches": Variant(routed, few),
        }
        if fp8:
            variants["CGGR, kv, FP8 for other tokens"] = Variant(*fp8, many)
        yield variants


@contextmanager
def grpo(sizes: Sizes, model: Any, prompt: int) -> Iterator[dict[str, Variant]]:
    """Groups of completions, an advantage for each."""
    rows, length = sizes.groups * sizes.generations, prompt + sizes.completion
    generator = torch.Generator().manual_seed(SEED)
    batch = {
        "prompt_ids": tokens_of(sizes.model, sizes.groups, prompt).repeat_interleave(sizes.generations, 0),
        "completion_ids": tokens_of(sizes.model, rows, sizes.completion),
        "advantages": torch.randn(rows, generator=generator).to(sizes.model.device),
    }
    batch["prompt_mask"] = torch.ones_like(batch["prompt_ids"])
    batch["completion_mask"] = torch.ones_like(batch["completion_ids"])
    order = torch.randperm(rows, generator=generator).to(sizes.model.device)
    items = {"num_items_in_batch": batch["completion_mask"].sum()}
    shuffled = {name: value[order] for name, value in batch.items()} | items
    values = {
        "num_generations": sizes.generations, "per_device_train_batch_size": sizes.generations,
        "max_completion_length": sizes.completion, "top_entropy_quantile": 0.2,
        "reward_funcs": lambda completions, **_: [0.0] * len(completions),
    }  # fmt: skip
    few, many = (max(1, count // length) for count in (sizes.plain, sizes.routed))
    with trainers(sizes, model, GRPOTrainer, RoutedGRPO, GRPOConfig, CGGRConfig(), **values) as (plain, routed):
        known = shuffled | old_values(plain, shuffled, few)
        yield {
            CONTROL: Variant(plain, split(shuffled, few), checkpointing=True),
            PLAIN: Variant(plain, split(shuffled, few)),
            "CGGR, kv": Variant(routed, split(shuffled, many)),
            "CGGR, kv, twice the micro-batch": Variant(routed, split(shuffled, 2 * many)),
            "CGGR, kv, groups together": Variant(routed, split(batch | items, many)),
            "CGGR, kv, entropies known": Variant(routed, split(known, many)),
        }


@torch.no_grad()
def old_values(trainer: Any, batch: dict[str, Any], rows: int) -> dict[str, Tensor]:
    """The entropies that the pass for the old log-probabilities adds to a batch."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    length = batch["completion_ids"].shape[1]
    found = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, mask, length, batch_size=rows, compute_entropy=True
    )
    return {"old_per_token_logps": found[0], "cggr_entropies": found[1]}


@contextmanager
def dpo(sizes: Sizes, model: Any, prompt: int) -> Iterator[dict[str, Variant]]:
    """Pairs, chosen completions first, as in TRL's collator."""
    pairs, _, completion = sizes.pairs
    ids = torch.cat(
        [
            tokens_of(sizes.model, pairs, prompt).repeat(2, 1),
            tokens_of(sizes.model, 2 * pairs, completion),
        ],
        dim=1,
    )
    mask = (torch.arange(prompt + completion, device=ids.device) >= prompt).long().expand_as(ids)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}

    def batches(tokens: int) -> list[dict[str, Any]]:
        count = max(1, tokens // (2 * (prompt + completion)))
        halves = [torch.arange(at, min(at + count, pairs), device=ids.device) for at in range(0, pairs, count)]
        return [{name: value[torch.cat([at, at + pairs])] for name, value in batch.items()} for at in halves]

    reference = copy.deepcopy(model).eval().requires_grad_(False)
    with trainers(sizes, model, DPOTrainer, RoutedDPO, DPOConfig, CGGRConfig(), ref_model=reference) as (plain, routed):
        yield {
            CONTROL: Variant(plain, batches(sizes.plain), checkpointing=True),
            PLAIN: Variant(plain, batches(sizes.plain)),
            "CGGR, kv": Variant(routed, batches(sizes.routed)),
        }


def cases(sizes: Sizes, tasks: list[str]) -> list[tuple[str, str, Callable[..., Any], int]]:
    """Name of each measurement, its task, its factory and its size."""
    made = {
        "sft": [("sft", sft, sizes.sft[1])],
        "grpo": [(f"grpo_{prompt}", grpo, prompt) for prompt in sizes.prompts],
        "dpo": [("dpo", dpo, sizes.pairs[1])],
    }
    return [(name, task, make, size) for task in tasks for name, make, size in made[task]]


def time_variants(
    variants: dict[str, Variant], *, device: str, seconds: float, least: int = 3
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Rows of a result, and the names of variants that do not fit in the device's memory."""
    deadline = time.monotonic() + seconds
    updates, calls, captured, too_large = {}, {}, {}, []
    for name, variant in variants.items():
        update = Update(variant)
        call = _record.PeakOf(update) if device == "cuda" else update
        started = time.perf_counter()
        try:
            for _ in range(MOST_FIRST):
                call()
                if not update.captured.startswith("no kind of step"):
                    break
            updates[name], calls[name], captured[name] = update, call, update.captured
        except torch.OutOfMemoryError:
            too_large.append(name)
        if name not in calls:  # outside the handler, which holds the failed update's tensors
            variant.trainer.model.zero_grad(set_to_none=True)
            variant.trainer.model.gradient_checkpointing_disable()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        print(f"  {name}: {'first update' if name in calls else 'does not fit'}", end=" ", flush=True)
        print(f"{time.perf_counter() - started:.1f} s", flush=True)
    for call in calls.values():
        if isinstance(call, _record.PeakOf):
            call.forget()
    control = CONTROL if CONTROL in updates else next(iter(updates))
    rows = _record.measure_until(calls, control=control, deadline=deadline, rounds=20, least=least, device=device)
    for name, call in calls.items():
        rows[name]["keep"] = updates[name].kept()
        rows[name]["captured"] = captured[name]
        if isinstance(call, _record.PeakOf):
            rows[name]["peak_extra_bytes"] = call.peak
    return rows, too_large


def report(name: str, task: str, rows: dict[str, dict[str, Any]]) -> None:
    """Print the table and whether the bars are met."""
    plain = rows.get(PLAIN, {}).get("median")
    print(f"{name:32} {'ms':>9} {'faster':>8} {'than plain':>11} {'keep':>6} {'peak GB':>8}")
    for row, found in rows.items():
        beside = f"{plain / found['median']:10.2f}x" if plain else f"{'':>11}"
        peak = f"{found['peak_extra_bytes'] / 1e9:8.1f}" if "peak_extra_bytes" in found else ""
        times = f"{found['median'] * 1e3:9.1f} {found['ratio']['median']:7.2f}x {beside}"
        captured = "" if found["captured"] == "no" else found["captured"]
        print(f"  {row:30} {times} {found['keep']:6.1%} {peak} {captured}")
    if task in BARS and plain:
        over_checkpointed, over_plain = BARS[task]
        found = rows["CGGR, kv"]
        met = found["ratio"]["median"] >= over_checkpointed and plain / found["median"] >= over_plain
        print(f"  bar {over_checkpointed}x and {over_plain}x: {'met' if met else 'missed'}")


def measure_shape(shape: str, options: argparse.Namespace) -> None:
    """All tasks of a shape; each writes its JSON and its plot at its end."""
    changes = {name: getattr(options, name) for name in ("plain", "routed", "completion")}
    changes["prompts"] = options.prompts and tuple(options.prompts)
    sizes = replace(SIZES[shape], **{name: value for name, value in changes.items() if value})
    device = sizes.model.device
    for name, task, make, size in cases(sizes, options.task):
        model = sizes.model.model()
        with make(sizes, model, size) as variants:
            print(f"{name}, {shape}", flush=True)
            wanted = {row: one for row, one in variants.items() if not (options.briefly and row in OTHER_BATCHES)}
            rows, too_large = time_variants(wanted, device=device, seconds=options.seconds, least=options.least)
        settings = sizes.model.settings() | {key: value for key, value in vars(sizes).items() if key != "model"}
        settings |= {"task": task, "size": size, "seed": SEED, "backend": os.environ.get("CGGR_BACKEND", "auto")}
        settings |= {"out_of_memory": too_large}
        control = CONTROL if CONTROL in rows else next(iter(rows))
        file = f"{options.name}_{name}_{shape}"
        path = _record.write(file, rows, settings=settings, control=control, device=device, folder=options.output)
        _record.plot(_record.load(file, folder=options.output), path.with_suffix(".png"), label="seconds per update")
        report(name, task, rows)
        del model, variants, wanted
        gc.collect()  # trainers hold each other in reference cycles
        if device == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    """Run the tasks of the shapes, and write a JSON and a plot for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SIZES, nargs="+")
    parser.add_argument("--task", nargs="*", choices=("sft", "grpo", "dpo"), default=["sft", "grpo", "dpo"])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each measurement")
    parser.add_argument("--least", type=int, default=3, help="fewest timed rounds, whatever --seconds says")
    parser.add_argument("--briefly", action="store_true", help="leave out GRPO's variants with other micro-batches")
    parser.add_argument("--prompts", type=int, nargs="*", help="lengths of GRPO's prompts, instead of the shape's own")
    parser.add_argument("--completion", type=int, help="length of GRPO's completions, instead of the shape's own")
    parser.add_argument("--plain", type=int, help="tokens of a plain micro-batch, instead of the shape's own")
    parser.add_argument("--routed", type=int, help="tokens of a routed micro-batch, instead of the shape's own")
    parser.add_argument("--name", default="trl_trainers", help="first part of the result files' names")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the results")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    disable_progress_bars()
    for shape in options.shape:
        measure_shape(shape, options)


if __name__ == "__main__":
    main()
