"""How much of the gradient a routed step misses if it keeps whole stretches of tokens instead of single ones.

``python -m benchmarks.blocks MODEL DATA``: a folder with a pretrained model (also as GGUF), and a JSON Lines file with
``question`` and ``answer``. Every token of a batch is kept once, in four selections of a quarter each, so that the mean
of their gradients has no sampling noise: its remaining distance from the full gradient is what the gradient mode cuts
off. Single tokens are the control.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import _record
from cggr_core import CGGRModel, Selection
from cggr_train.presets import load_model
from cggr_train.tokenizer import load_tokenizer

ROWS, LENGTH, PARTS = 1, 256, 4
MODES, SIZES = ("kv", "detached"), (1, 8, 32, 64)


def gradient(model: CGGRModel, input_ids: Tensor, selection: Selection | None = None) -> Tensor:
    """The gradient of all parameters, float64 ``[P]``."""
    model.zero_grad(set_to_none=True)
    model(input_ids, labels=input_ids, selection=selection).backward()
    return torch.cat([value.grad.flatten() for value in model.parameters() if value.grad is not None]).double()


def parts(size: int, seed: int) -> list[Selection]:
    """Selections of a quarter of the blocks each, which together keep every countable token once."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.arange(LENGTH) // size
    order = torch.stack([torch.randperm(LENGTH // size, generator=generator) for _ in range(ROWS)])
    countable = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    countable[:, -1] = False
    weight = torch.full((ROWS, LENGTH), float(PARTS))
    masks = [(order[:, block] % PARTS == part) & countable for part in range(PARTS)]
    return [Selection.from_mask(mask, weight=weight, countable=countable) for mask in masks]


def cosine(model: nn.Module, mode: str, size: int, input_ids: Tensor, full: Tensor, seed: int) -> float:
    """Cosine of the parts' mean gradient with the full one."""
    routed = CGGRModel(model, gradient=mode).train()
    mean = torch.stack([gradient(routed, input_ids, selection) for selection in parts(size, seed)]).mean(0)
    return float(torch.nn.functional.cosine_similarity(mean, full, dim=0))


def main() -> None:
    """Measure, and write ``results/blocks.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a causal language model")
    parser.add_argument("data", type=Path, help="JSON Lines with question and answer")
    parser.add_argument("--seeds", type=int, default=3, help="batches, each with its own selections")
    _record.add_seconds(parser)
    arguments = parser.parse_args()
    deadline = _record.deadline(arguments.seconds)
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    lines = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()[:400]]
    ids = tokenizer("\n\n".join(f"{line['question']}\n{line['answer']}" for line in lines))["input_ids"]
    found: dict[str, list[float]] = {f"{mode}, blocks of {size}": [] for mode in MODES for size in SIZES}
    seeds = 0
    for seed in range(arguments.seeds):
        if seed and _record.is_over(deadline):
            break
        seeds += 1
        input_ids = torch.tensor(ids[seed * ROWS * LENGTH : (seed + 1) * ROWS * LENGTH]).view(ROWS, LENGTH)
        full = gradient(CGGRModel(model, gradient="exact", min_tokens_ratio=1.0).train(), input_ids)
        for mode in MODES:
            for size in SIZES:
                found[f"{mode}, blocks of {size}"].append(cosine(model, mode, size, input_ids, full, seed))
                print(seed, mode, size, f"{found[f'{mode}, blocks of {size}'][-1]:.3f}", flush=True)
    rows = {name: _record.summary(values) | {"unit": "cosine"} for name, values in found.items()}
    settings = {
        "model": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "rows": ROWS,
        "sequence": LENGTH,
        "keep_ratio": 1 / PARTS,
        "dtype": "float32",
        "seed": 0,
        "seeds": seeds,
    }
    print(_record.write("blocks", rows, settings=settings, control="kv, blocks of 1"))


if __name__ == "__main__":
    main()
