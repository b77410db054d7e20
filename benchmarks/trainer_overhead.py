"""What the Hugging Face Trainer adds to a CGGR step: CGGRTrainer against a plain loop over the same CGGRModel.

``python -m benchmarks.trainer_overhead cpu`` (two cores, minutes), ``... 1b`` and ``... 135m`` (one CUDA device). Both
train the same model on the same batches, with the same optimizer and clipping, from the same kind of data loader; steps
are timed after a warm-up, in turns. The plain Trainer and a plain loop, on all tokens, show how much of it is the
Trainer's own. The bar: at most 3% over the plain loop, ``overhead`` in the result.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from benchmarks import _record
from benchmarks._random_model import SEED
from benchmarks._steps import SHAPES, Shape
from cggr_core import CGGRModel
from cggr_core.settings import RoutingSettings
from cggr_train import CGGRConfig, CGGRTrainer

BAR = 0.03
CONTROL = "CGGRModel, plain loop"
ROUTED, FILTERED = "CGGRTrainer", "CGGRTrainer, logging_nan_inf_filter=True"
OTHERS = ("Trainer, all tokens", "all tokens, plain loop")
CLIP = 1.0


def rows_of(shape: Shape, count: int) -> list[dict[str, Tensor]]:
    """Sequences of random tokens."""
    tokens = torch.randint(0, shape.vocab, (count, shape.length), generator=torch.Generator().manual_seed(SEED))
    return [{"input_ids": row, "labels": row} for row in tokens]


class StepClock:
    """Seconds of each step after a warm-up; the device is synchronised only at both ends."""

    def __init__(self, device: str, *, warmup: int, steps: int) -> None:
        self._device, self._warmup, self._steps = device, warmup, steps
        self._done = 0
        self._started = self.seconds = 0.0

    def step(self) -> None:
        """Record that a step was queued."""
        self._done += 1
        if self._done in (self._warmup, self._warmup + self._steps):
            if self._device == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds, self._started = (now - self._started) / self._steps, now


class ClockCallback(TrainerCallback):
    """Passes the Trainer's steps to a clock."""

    def __init__(self) -> None:
        self.clock: StepClock | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a step."""
        if self.clock is not None:
            self.clock.step()


@contextmanager
def trainer(kind: type[Trainer], shape: Shape, model: nn.Module, steps: int, *, nan_filter: bool) -> Iterator[Any]:
    """A Trainer whose ``train()`` takes a given number of steps, and its clock."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=shape.batch, learning_rate=1e-5, optim="adamw_torch",
            lr_scheduler_type="constant", max_grad_norm=CLIP, logging_steps=10, save_strategy="no", report_to="none",
            disable_tqdm=True, use_cpu=shape.device == "cpu", logging_nan_inf_filter=nan_filter, seed=SEED,
            dataloader_pin_memory=shape.device == "cuda",
        )  # fmt: skip
        more: dict[str, Any] = {"cggr": CGGRConfig()} if kind is CGGRTrainer else {}
        data: Any = rows_of(shape, steps * shape.batch)
        made = kind(model, arguments, train_dataset=data, data_collator=default_data_collator, **more)
        clocked = ClockCallback()
        made.add_callback(clocked)
        yield made, clocked


def loop(step_model: nn.Module, parameters: list[nn.Parameter], shape: Shape, clock: StepClock, steps: int) -> None:
    """An ordinary training loop without a Trainer."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)
    generator = torch.Generator().manual_seed(SEED)
    data: Any = rows_of(shape, steps * shape.batch)
    batches = DataLoader(
        data, shape.batch, shuffle=True, generator=generator, collate_fn=default_data_collator,
        pin_memory=shape.device == "cuda",
    )  # fmt: skip
    for batch in batches:
        batch = {name: value.to(shape.device, non_blocking=True) for name, value in batch.items()}
        found = step_model(**batch)
        loss = found if isinstance(found, Tensor) else found.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.step()


def measure(
    shape: Shape, *, rounds: int, warmup: int, steps: int, names: list[str], deadline: float
) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """Seconds of a step by round and row: the rounds so far, yielded whenever both orders have run equally often."""
    model = shape.model()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    routed = CGGRModel(model, seed=SEED)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        if turn and turn % 2 == 0 and _record.is_over(deadline):
            return
        for name in names if turn % 2 == 0 else reversed(names):
            clock = StepClock(shape.device, warmup=warmup, steps=steps)
            if name in (CONTROL, OTHERS[1]):
                loop(routed.train() if name == CONTROL else model.train(), parameters, shape, clock, warmup + steps)
            else:
                kind = Trainer if name == OTHERS[0] else CGGRTrainer
                with trainer(kind, shape, model, warmup + steps, nan_filter=name == FILTERED) as (made, clocked):
                    clocked.clock = clock
                    made.train()
            seconds[name].append(clock.seconds)
            model.zero_grad(set_to_none=True)
            print(f"round {turn + 1}: {name}: {clock.seconds * 1e3:.1f} ms a step", flush=True)
        if turn % 2 or turn + 1 == rounds:
            yield turn + 1, seconds


def rows_from(seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Rows of the result."""
    rows = {}
    for name, samples in seconds.items():
        control = seconds[OTHERS[1] if name in OTHERS else CONTROL]
        ratios = [one / other for one, other in zip(control, samples, strict=True)]
        overhead = [other / one - 1 for one, other in zip(control, samples, strict=True)]
        rows[name] = _record.summary(samples) | {
            "unit": "s", "ratio": _record.summary(ratios), "overhead": _record.summary(overhead),
        }  # fmt: skip
    rows[ROUTED] |= {"bar": {"overhead": BAR, "met": rows[ROUTED]["overhead"]["median"] <= BAR}}
    return rows


def main() -> None:
    """Run one shape and write its JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=6, help="even, so that both orders run equally often")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=10, help="steps that are")
    parser.add_argument("--batch", type=int, help="instead of the shape's own")
    parser.add_argument("--routed-only", action="store_true", help="leave out the Trainer on all tokens")
    parser.add_argument("--name", help="of the result file")
    _record.add_seconds(parser)
    options = parser.parse_args()
    deadline = _record.deadline(options.seconds)
    shape = SHAPES[options.shape]
    if options.batch:
        shape = Shape(**{**vars(shape), "batch": options.batch})
    names = [CONTROL, ROUTED, FILTERED, *(() if options.routed_only else OTHERS)]
    settings = {
        "batch": shape.batch, "sequence": shape.length, "layers": shape.layers, "hidden": shape.hidden,
        "vocabulary": shape.vocab, "dtype": str(shape.dtype), "keep_ratio": RoutingSettings.min_tokens_ratio,
        "seed": SEED, "optimizer": "AdamW", "steps": options.steps, "warmup": options.warmup,
    }  # fmt: skip
    name = options.name or f"trainer_overhead_{options.shape}"
    timing = {"rounds": options.rounds, "warmup": options.warmup, "steps": options.steps}
    for rounds, seconds in measure(shape, **timing, names=names, deadline=deadline):
        rows = rows_from(seconds)
        path = _record.write(name, rows, settings=settings | {"rounds": rounds}, control=CONTROL, device=shape.device)
        _record.plot(_record.load(name), path.with_suffix(".png"), label="seconds a step")
    for row, found in rows.items():
        print(f"{row}: {found['median'] * 1e3:.1f} ms, overhead {found['overhead']['median']:.1%}")


if __name__ == "__main__":
    main()
