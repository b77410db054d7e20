"""One run of the demo, alone in its process so that its peak memory is its own.

``python -m cggr_train.demo.worker spec.json`` trains as the file says and writes the result beside it. It takes
turns: after its start and after every few seconds of training it prints ``{"event": "turn"}`` and waits for a line
on its standard input, so that the compared runs share the machine's good and bad moments alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cggr_train.data import Batches, TokenStore
from cggr_train.data.batches import in_order
from cggr_train.errors import DivergedError
from cggr_train.evaluate import heldout_loss
from cggr_train.learner import Routing, build_learner
from cggr_train.loop import Budget, Clock, LearningRate, LoopSettings, Progress, build_optimizer, train_steps
from cggr_train.memory import memory_in_use, peak_memory
from cggr_train.presets import build_config, build_model

EVALUATION_BATCH = 4  # small, so that an evaluation never sets the peak memory of a training run


@dataclass(frozen=True)
class RunSpec:
    """What one run of the demo does.

    Attributes:
        name: Which of the compared methods.
        method: Which learner.
        batch_size: Sequences per step.
        routing: For the routed learners.
        tokens: Folder of the token store.
        out: Folder for the result (and the model, where asked for).
        preset: Model size.
        vocab_size: Rows of the embedding.
        length: Tokens per sequence.
        seconds: Training time.
        turn_seconds: Training time between two turns.
        learning_rate: Peak.
        seed: Of weights, order and selections.
        evaluations: Points on the curve besides the start.
        eval_sequences: Held-out sequences of the curve; the loss that is reported takes four times as many.
        save_model: Whether to keep the trained model.
    """

    name: str
    method: str
    batch_size: int
    routing: Routing
    tokens: str
    out: str
    preset: str
    vocab_size: int
    length: int
    seconds: float
    turn_seconds: float
    learning_rate: float
    seed: int
    evaluations: int = 8
    eval_sequences: int = 16
    save_model: bool = False

    def to_json(self) -> str:
        """The specification as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> RunSpec:
        """Read what :meth:`to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "routing": Routing(**values["routing"])})


def run(spec: RunSpec, wait_for_turn: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Train as ``spec`` says.

    Args:
        spec: What to do.
        wait_for_turn: Called before the first step and after every turn; returns when it is this run's turn.

    Returns:
        Figures of the run: ``heldout_loss`` (nats per token), ``steps``, ``tokens``, ``kept_tokens`` (an estimate
        from the mean keep ratio), ``seconds``, ``core_share`` (processor time by wall-clock time, well below 1 where
        the process had to wait for a core), ``step_seconds`` (median), ``peak_bytes``, ``start_bytes`` (in use
        before the first step), ``keep_ratio``, ``engine``, and the ``curve``.

    Raises:
        DivergedError: If the loss is no longer finite.
    """
    device = torch.device("cpu")
    tokens = TokenStore.open(Path(spec.tokens))
    model = build_model(build_config(spec.preset, vocab_size=spec.vocab_size, length=spec.length), seed=spec.seed)
    learner = build_learner(model, spec.method, spec.routing, seed=spec.seed)
    optimizer = build_optimizer(model, weight_decay=0.1)
    batches = Batches(tokens.train, length=spec.length, batch_size=spec.batch_size, seed=spec.seed)
    held = {"length": spec.length, "batch_size": EVALUATION_BATCH}
    short = in_order(tokens.heldout, **held, limit=spec.eval_sequences)
    full = in_order(tokens.heldout, **held, limit=4 * spec.eval_sequences)
    settings = LoopSettings(Budget(seconds=spec.seconds), LearningRate(spec.learning_rate))
    progress, step_ends, keep_ratios = Progress(), [0.0], list[float]()
    curve = [{"seconds": 0.0, "tokens": 0, "heldout_loss": heldout_loss(model, short, device=device)}]
    start_bytes = memory_in_use(device)
    wait_for_turn()
    turn_started, processor_seconds = 0.0, -time.process_time()
    clock = Clock(device)

    def on_step(loss: Tensor, rate: float) -> None:
        nonlocal turn_started, processor_seconds
        step_ends.append(progress.seconds)
        keep_ratios.append(float(learner.metrics.get("keep_ratio", 1.0)))
        value = loss.item()
        if value != value:
            raise DivergedError(f"{spec.name}: the loss is {value} at step {progress.step}")
        spent = settings.budget.spent(progress)
        rate = spec.batch_size * spec.length / (step_ends[-1] - step_ends[-2])
        _tell(event="step", spent=spent, step=progress.step, loss=value, keep_ratio=keep_ratios[-1],
              tokens_per_second=rate, memory=memory_in_use(device))  # fmt: skip
        if spent < 1 and spent >= len(curve) / spec.evaluations:
            with clock.paused():
                processor_seconds += time.process_time()
                loss_now = heldout_loss(model, short, device=device)
                processor_seconds -= time.process_time()
            curve.append({"seconds": progress.seconds, "tokens": progress.tokens, "heldout_loss": loss_now})
        if spent < 1 and progress.seconds - turn_started >= spec.turn_seconds:
            with clock.paused():
                wait_for_turn()
            turn_started = progress.seconds

    train_steps(learner, optimizer, batches, settings, progress, clock, on_step=on_step)
    processor_seconds += time.process_time()
    peak_bytes = peak_memory(device)
    final = heldout_loss(model, short, device=device)
    curve.append({"seconds": progress.seconds, "tokens": progress.tokens, "heldout_loss": final})
    durations = sorted(end - start for start, end in itertools.pairwise(step_ends))
    keep_ratio = sum(keep_ratios) / max(len(keep_ratios), 1)
    countable = progress.step * spec.batch_size * (spec.length - 1)
    if spec.save_model:
        model.save_pretrained(Path(spec.out, "model"))
    return {
        "name": spec.name,
        "heldout_loss": heldout_loss(model, full, device=device),
        "steps": progress.step,
        "tokens": progress.tokens,
        "kept_tokens": round(keep_ratio * countable),
        "seconds": progress.seconds,
        "core_share": processor_seconds / progress.seconds,
        "step_seconds": durations[len(durations) // 2] if durations else 0.0,
        "peak_bytes": peak_bytes,
        "start_bytes": start_bytes,
        "keep_ratio": keep_ratio,
        "engine": str(learner.metrics.get("engine", "")),
        "curve": curve,
    }


def main(path: str) -> None:
    """Run the specification in the file ``path``."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(1)
    spec = RunSpec.from_json(Path(path).read_text(encoding="utf-8"))
    result = run(spec, wait_for_turn=_wait_for_turn)
    Path(path).with_suffix(".result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")


def _wait_for_turn() -> None:
    _tell(event="turn")
    if not sys.stdin.readline():
        sys.exit(1)  # whoever gave the turns is gone


def _tell(**record: Any) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
