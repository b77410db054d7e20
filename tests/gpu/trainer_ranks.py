"""One rank of :mod:`test_trainer_native`: CGGRTrainer on a share of each batch, compared with what one process did."""

import os
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from cggr_train import CGGRConfig
from tests.train.trainer_kit import examples, relative_error, tiny_model, trainer

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
    """All of a parameter that may be spread over ranks."""
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def main(engine: str, folder: Path) -> None:
    """Compare every setting."""
    more = {"fsdp": True, "fsdp_config": FSDP} if engine == "FSDP2" else {}
    for name, cggr in SETTINGS.items():
        wanted = torch.load(folder / f"{name}.pt")
        made, found = run(cggr, folder / "run", per_device_train_batch_size=4 // world_size(), **more)
        assert made.is_fsdp_enabled == (engine == "FSDP2")
        error = relative_error(found["change"], wanted["change"])
        assert error <= 1e-5, (engine, name, error)
        for mine, alone in zip(found["log"], wanted["log"], strict=True):
            for key in ("kept_tokens", "countable_tokens"):
                assert mine[key] == alone[key], (engine, name, key, mine[key], alone[key])
            assert abs(mine["loss"] - alone["loss"]) <= 1e-3, (engine, name, mine["loss"], alone["loss"])
    made, found = run(SETTINGS["interleaved, random"], folder / "run", bf16=True,
                      per_device_train_batch_size=4 // world_size(), **more)  # fmt: skip
    wanted = torch.load(folder / "interleaved, random.pt")
    error = relative_error(found["change"], wanted["change"])
    assert error <= 0.05, (engine, "bf16", error)


def world_size() -> int:
    """Ranks of this launch."""
    return int(os.environ["WORLD_SIZE"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
