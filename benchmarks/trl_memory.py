"""What an update of TRL's SFTTrainer keeps for its backward pass, by source, routed and as it comes.

``python -m benchmarks.trl_memory cpu`` (seconds), ``... 1b`` (one CUDA device, ten seconds). Needs ``trl``. Rows of
8,192 tokens of which 10% are supervised, a micro-batch as TRL has it (see :mod:`benchmarks.trl_trainers`).

Every tensor that autograd keeps is counted once, under the module that kept it, apart for the tokens that have a
backward and for those that are context; weights are not counted. Beside them stand weights, gradient and the states of
AdamW, and on a GPU the peak of the update above weights.
"""

import argparse
import gc
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _record
from benchmarks._random_model import SEED
from benchmarks.trl_trainers import CONTROL, PLAIN, SIZES, Update, sft
from cggr_train import CGGRMixin

ROUTED = "CGGR, kv, TRL's micro-batches"
_PARTS = {
    "norms": r"norm",
    "attention: projections": r"[qkv]_proj|o_proj",
    "attention: the rest": r"self_attn",
    "MLP": r"mlp|_proj|act_fn",
    "layers: the rest": r"layers\.\d+$",
}


@contextmanager
def counted(model: Any, tokens: int, *, routed: bool) -> Iterator[dict[str, int]]:
    """Bytes kept for the backward pass by source, until the end of the block.

    Args:
        model: The model that is run.
        tokens: Of the micro-batch. A layer that runs less than half of them runs those that have a backward.
        routed: Whether the others are context.
    """
    found: dict[str, int] = defaultdict(int)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Any] = {}  # storages that are held, so that no address is given twice
    names = {module: name for name, module in model.named_modules()}
    stack: list[tuple[str, int]] = [("", tokens)]

    def enter(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        wide = isinstance(hidden, Tensor) and hidden.dim() == 3
        stack.append((names[module], hidden.shape[0] * hidden.shape[1] if wide else stack[-1][1]))

    def leave(*_: Any) -> None:
        stack.pop()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in kept:
            kept[storage.data_ptr()] = storage
            name, count = stack[-1]
            of = "all tokens" if not routed else "kept tokens" if 2 * count < tokens else "context tokens"
            found[source(name, of)] += storage.nbytes()
        return tensor

    handles = []
    for module in names:
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def source(name: str, tokens: str) -> str:
    """Which line of the account a module belongs to."""
    if "layers." not in name:
        return "head, embeddings and loss"
    inside = re.sub(r".*layers\.\d+\.?", "", name) or "layers.0"
    part = next((part for part, pattern in _PARTS.items() if re.search(pattern, inside)), "layers: the rest")
    return f"{part}, {tokens}"


def account(update: Update, device: str) -> dict[str, Any]:
    """The sources of one variant's memory, in bytes."""
    trainer, batch = update.variant.trainer, update.variant.batches[0]
    model = trainer.model
    if update.variant.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    routed = isinstance(trainer, CGGRMixin)
    with counted(model, batch["input_ids"].numel(), routed=routed) as found:
        loss = trainer.compute_loss(model, dict(batch))
    saved = dict(found)
    del loss
    gc.collect()
    if update.variant.checkpointing:
        model.gradient_checkpointing_disable()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    row: dict[str, Any] = {
        "weights": weights, "gradient": weights, "AdamW": 2 * weights, "kept for the backward pass": saved,
    }  # fmt: skip
    if device == "cuda":
        update.variant.batches[1:] = []
        peak = _record.PeakOf(update)
        peak()
        peak.forget()
        peak()
        row["peak above weights"] = peak.peak
    return row


def report(rows: dict[str, dict[str, Any]]) -> None:
    """Print the account in Markdown, in GB."""
    sources = sorted({name for row in rows.values() for name in row["kept for the backward pass"]})
    print("| GB | " + " | ".join(rows) + " |")
    print("|---|" + "---|" * len(rows))
    lines = {name: [row["kept for the backward pass"].get(name, 0) for row in rows.values()] for name in sources}
    lines["kept for the backward pass"] = [sum(row["kept for the backward pass"].values()) for row in rows.values()]
    for name in ("gradient", "peak above weights", "weights", "AdamW"):
        if all(name in row for row in rows.values()):
            lines[name] = [row[name] for row in rows.values()]
    for name, values in lines.items():
        print(f"| {name} | " + " | ".join(f"{value / 1e9:.4g}" for value in values) + " |")


def main() -> None:
    """Count, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SIZES)
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the result")
    _record.add_seconds(parser)
    options = parser.parse_args()
    sizes = SIZES[options.shape]
    end = _record.deadline(options.seconds)
    model = sizes.model.model()
    rows = {}
    with sft(sizes, model, sizes.sft[1]) as variants:
        for name in (CONTROL, PLAIN, ROUTED):
            if _record.is_over(end):
                break
            row = account(Update(variants[name]), sizes.model.device)
            total = sum(row["kept for the backward pass"].values())
            rows[name] = {**row, "unit": "bytes", "median": total, "spread": [total, total]}
    settings = sizes.model.settings() | {"seed": SEED, "tokens": sizes.plain}
    device = sizes.model.device
    _record.write(
        f"trl_memory_{options.shape}", rows, settings=settings, control=CONTROL, device=device, folder=options.output
    )
    report(rows)


if __name__ == "__main__":
    main()
