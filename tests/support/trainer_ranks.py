"""One rank of :mod:`test_trainer_native`: CGGRTrainer on a share of each batch, compared with one process."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from cggr_train import CGGRConfig
from tests.support.trainer_kit import examples, relative_error, tiny_model, trainer

STARTED = time.perf_counter()
STEPS, LEARNING_RATE = 3, 0.05
SETTINGS = {
    "default": CGGRConfig(),
    "exact, sampled": CGGRConfig(gradient="exact", selection="sampled"),
    "interleaved, random": CGGRConfig(selection="random"),
    "interleaved, truncated": CGGRConfig(router="truncated", router_depth=1, selection="sampled"),
    "detached, two passes": CGGRConfig(gradient="detached", selection="supervised", engine="two_pass"),
}
FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "reshard_after_forward": True}


def wide_model(**settings):
    """A model whose heads are as long as the attention kernels take them."""
    return tiny_model(hidden_size=128, intermediate_size=192, num_hidden_layers=3, **settings)


def run(cggr: CGGRConfig, folder: Path, *, model=None, **values):
    """Train on the GPU; the Trainer, and what training did."""
    plain = {"max_steps": STEPS, "learning_rate": LEARNING_RATE, "data": examples(4 * STEPS)}
    values = {**plain, "per_device_train_batch_size": 4, **values}
    made = trainer(folder, cggr, model=wide_model() if model is None else model, use_cpu=False, **values)
    made.train()
    trained = dict(made.accelerator.unwrap_model(made.model).named_parameters())
    start = wide_model().named_parameters()
    return made, {
        "change": {name: whole(trained[name]).cpu() - parameter.detach() for name, parameter in start},
        "log": [record for record in made.state.log_history if "loss" in record],
    }


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter that may be sharded over ranks."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def main(engine: str, alone: Path, folder: Path) -> None:
    """Compare every setting with the results of one process in ``alone``."""
    more: dict[str, Any] = {"fsdp": True, "fsdp_config": FSDP} if engine == "FSDP2" else {}
    more["per_device_train_batch_size"] = 4 // world_size()
    wrong = []
    for name, cggr in SETTINGS.items():
        wanted = torch.load(alone / f"{name}.pt")
        made, found = run(cggr, folder, **more)
        assert made.is_fsdp_enabled == (engine == "FSDP2")
        wrong += compare(f"{engine}, {name}", found, wanted, limit=1e-5)
    name = "interleaved, random"
    _, found = run(SETTINGS[name], folder, bf16=True, **more)
    wrong += compare(f"{engine}, {name}, bf16", found, torch.load(alone / f"{name}.pt"), limit=0.05)
    assert not wrong, "\n".join(wrong)


def compare(what: str, found: dict[str, Any], wanted: dict[str, Any], *, limit: float) -> list[str]:
    """What differs, of what training did to the weights and of what it logged."""
    error = relative_error(found["change"], wanted["change"])
    if os.environ["RANK"] == "0":
        print(f"{what}: {error:.1e} after {time.perf_counter() - STARTED:.0f} s", flush=True)
    wrong = [] if error <= limit else [f"{what}: {error:.1e} > {limit}"]
    for mine, one in zip(found["log"], wanted["log"], strict=True):
        if any(mine[key] != one[key] for key in ("kept_tokens", "countable_tokens")):
            wrong.append(f"{what}: {mine} instead of {one}")
        if abs(mine["loss"] - one["loss"]) > max(1e-3, limit):
            wrong.append(f"{what}: loss {mine['loss']} instead of {one['loss']}")
    return wrong


def world_size() -> int:
    """Ranks of this launch."""
    return int(os.environ["WORLD_SIZE"])


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
