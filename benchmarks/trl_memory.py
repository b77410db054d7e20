"""What an update of TRL's SFTTrainer keeps for its backward pass, by source, routed and unmodified.

``python -m benchmarks.trl_memory slice`` (two cores, a minute): two layers as wide as the 1B model's, bytes for each
token and layer. ``... 1b`` (one CUDA device, ten seconds): the whole of it. Needs ``trl``. Rows of which 10% are
supervised, a micro-batch as TRL has it (see :mod:`benchmarks.trl_trainers`).

Tensors alive between forward and backward are counted under the module that created them, separately for tokens with a
backward and for context tokens. Weights, gradient and AdamW's states are listed as well, and on a GPU the peak of the
update above the weights.
"""

import argparse
import gc
import inspect
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import _record
from benchmarks._random_model import SEED
from benchmarks.trl_trainers import CONTROL, PLAIN, SIZES, Update, sft
from cggr_core import Selection
from cggr_train import CGGRMixin

ROUTED = "CGGR, kv, TRL's micro-batches"
CHECKPOINTED = "CGGR, kv, checkpointing"
SLICE = replace(
    SIZES["1b"],
    model=replace(SIZES["1b"].model, layers=2, vocab=1024, length=512, device="cpu"),
    sft=(2, 512),
    plain=1024,
    routed=1024,
)
_PARTS = {
    "norms": r"norm",
    "attention: projections": r"[qkv]_proj|o_proj",
    "attention: the rest": r"self_attn",
    "MLP": r"mlp|_proj|act_fn",
    "layers: the rest": r"layers\.\d+$",
}


class Held(TorchDispatchMode):
    """Records every op's outputs with their module and tokens, so that tensors still alive later can be attributed.

    Args:
        model: The model that is run.
        tokens: Maps a size in a tensor's shape to the tokens it stands for.
    """

    def __init__(self, model: Any, tokens: dict[int, str]) -> None:
        super().__init__()
        self._names = {module: name for name, module in model.named_modules()}
        self._tokens = tokens
        self._made: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage.data_ptr() in self._weights:
                    continue
                known = self._made.get(storage.data_ptr())
                if known is None or known[0].expired():
                    self._made[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes(), self._source(tensor)
        return out

    def alive(self) -> dict[str, int]:
        """Bytes held now, by source."""
        gc.collect()
        found: dict[str, int] = defaultdict(int)
        for storage, size, name in self._made.values():
            if not storage.expired():
                found[name] += size
        return dict(found)

    def _source(self, tensor: Tensor) -> str:
        of = next((name for size, name in self._tokens.items() if size in tensor.shape), "all tokens")
        return source(self._module(), of)

    def _module(self) -> str:
        """Name of the innermost running module."""
        frame = inspect.currentframe()
        while frame is not None:
            for own in ("self", "module"):
                found = frame.f_locals.get(own)
                if isinstance(found, nn.Module) and found in self._names:
                    return self._names[found]
            frame = frame.f_back
        return ""


def source(name: str, tokens: str) -> str:
    """The line of the account that a module belongs to."""
    if "layers." not in name:
        return "outside of the layers"
    inside = re.sub(r".*layers\.\d+\.?", "", name) or "layers.0"
    part = next((part for part, pattern in _PARTS.items() if re.search(pattern, inside)), "layers: the rest")
    return f"{part}, {tokens}"


def account(update: Update, device: str) -> dict[str, Any]:
    """The sources of one variant's memory, in bytes."""
    trainer, batch = update.variant.trainer, update.variant.batches[0]
    model = trainer.model
    if update.variant.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows, length = batch["input_ids"].shape
    tokens = {}
    kept = Selection.from_mask(pad(batch["labels"][:, 1:] != -100, (0, 1))).index.shape[1]
    if isinstance(trainer, CGGRMixin):
        for size, of in ((kept, "kept tokens"), (length - kept, "context tokens")):
            tokens |= {size: of, rows * size: of}
    with Held(model, tokens) as held:
        loss = trainer.compute_loss(model, dict(batch))
    saved = held.alive()
    del loss
    gc.collect()
    if update.variant.checkpointing:
        model.gradient_checkpointing_disable()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    layers = model.config.num_hidden_layers
    counts = {"all tokens": rows * length, "context tokens": rows * (length - kept), "kept tokens": rows * kept}
    by_token = {
        of: sum(size for name, size in saved.items() if name.endswith(of)) / count / layers / 1e3
        for of, count in counts.items()
    }
    row: dict[str, Any] = {
        "weights": weights, "gradient": weights, "AdamW": 2 * weights, "kept for the backward pass": saved,
        "kB per token and layer": {of: size for of, size in by_token.items() if size},
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
    """Print the account in Markdown, in GB, and the memory per token and layer, in kB."""
    sources = sorted({name for row in rows.values() for name in row["kept for the backward pass"]})
    print("| GB | " + " | ".join(rows) + " |")
    print("|---|" + "---|" * len(rows))
    lines = {name: [row["kept for the backward pass"].get(name, 0) for row in rows.values()] for name in sources}
    lines["kept for the backward pass"] = [sum(row["kept for the backward pass"].values()) for row in rows.values()]
    for name in ("gradient", "peak above weights", "weights", "AdamW"):
        if all(name in row for row in rows.values()):
            lines[name] = [row[name] for row in rows.values()]
    for name, row in rows.items():
        for of, kept in row["kB per token and layer"].items():
            print(f"{name}: {kept:.1f} kB for each of {of} and layer")
    for name, values in lines.items():
        print(f"| {name} | " + " | ".join(f"{value / 1e9:.4g}" for value in values) + " |")


def main() -> None:
    """Count, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=("slice", *SIZES))
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the result")
    _record.add_seconds(parser)
    options = parser.parse_args()
    sizes = SLICE if options.shape == "slice" else SIZES[options.shape]
    end = _record.deadline(options.seconds)
    model = sizes.model.model()
    rows = {}
    with sft(sizes, model, sizes.sft[1]) as variants:
        counted = {name: variants[name] for name in (CONTROL, PLAIN, ROUTED)}
        counted[CHECKPOINTED] = replace(variants[ROUTED], checkpointing=True)
        for name, variant in counted.items():
            if _record.is_over(end):
                break
            row = account(Update(variant), sizes.model.device)
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
