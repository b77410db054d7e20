"""One rank of :mod:`test_distributed`: CGGRTrainer on half of each batch, compared with one process."""

from pathlib import Path
from typing import Any

import torch

from cggr_train import CGGRConfig
from tests.support.trainer_kit import change, relative_error, tiny_model, trainer

SETTINGS = {
    "default": CGGRConfig(),
    "exact, sampled": CGGRConfig(gradient="exact", selection="sampled"),
    "interleaved, random": CGGRConfig(selection="random"),
    "detached, topk": CGGRConfig(gradient="detached", selection="topk"),
    "dynamic": CGGRConfig(dynamic_threshold=True, threshold_sensitivity=2.0),
}


def run(name: str, folder: Path, **split: Any):
    made = trainer(folder, SETTINGS[name], **split)
    made.train()
    return made, {
        "change": change(tiny_model(), made.model),
        "log": [record for record in made.state.log_history if "loss" in record],
    }


def compare(folder: Path) -> None:
    """Train every setting on this rank's share."""
    for name, cggr in SETTINGS.items():
        wanted = torch.load(folder / f"{name}.pt")
        splits: list[dict[str, Any]] = [{"per_device_train_batch_size": 2}]
        if not cggr.dynamic_threshold:  # there the ratio moves from micro-batch to micro-batch
            splits.append({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2})
        if name == "default":  # Accelerate's way to give the batch of all ranks
            splits.append({"per_device_train_batch_size": 4, "accelerator_config": {"split_batches": True}})
        for split in splits:
            made, found = run(name, folder / "run", **split)
            assert made.accelerator.num_processes == 2
            error = relative_error(found["change"], wanted["change"])
            assert error <= 1e-5, (name, split, error)
            for mine, whole in zip(found["log"], wanted["log"], strict=True):
                for key in ("kept_tokens", "countable_tokens"):
                    assert mine[key] == whole[key], (name, key, mine[key], whole[key])
                for key in {"loss", "score_kept", "full_loss"} & whole.keys():
                    assert abs(mine[key] - whole[key]) <= 1e-3 * abs(whole[key]), (name, key, mine[key], whole[key])


def resume(folder: Path) -> None:
    """Two ranks that resume from a checkpoint end with the weights of an uninterrupted run."""
    values = {"max_steps": 3, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    settings = {**values, "optim": "adamw_torch", "learning_rate": 1e-2, "train_sampling_strategy": "random"}
    whole, parts = (trainer(folder, CGGRConfig(ratio_warmup_steps=3), **settings) for _ in range(2))
    whole.train()
    parts.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    pairs = zip(whole.model.parameters(), parts.model.parameters(), strict=True)
    assert all(one.equal(other) for one, other in pairs)
    assert parts.routed_model().schedule.steps == 3
