"""The same update of every TRL trainer whose pass can be recorded, over batches of equal shapes."""

from typing import Any

import torch
from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from cggr_train import CGGRConfig
from tests.support.trl_kit import COMPLETION, PROMPTS, ROWS, build, model_for, policy_batch

ROWS_OF = {
    SFTTrainer: [{"prompt": text, "completion": f"    return a * {n}" + " - b" * n} for n, text in enumerate(PROMPTS)],
    DPOTrainer: [
        {"prompt": t, "chosen": f"    return a * {n}\n", "rejected": "    b\n"} for n, t in enumerate(PROMPTS)
    ],
    KTOTrainer: [
        {"prompt": text, "completion": f"    return a * {n}" + " - b" * n, "label": n % 2 == 0}
        for n, text in enumerate(PROMPTS)
    ],
}
CASES = {
    "sft": (SFTTrainer, SFTConfig, {}),
    "sft, dft": (SFTTrainer, SFTConfig, {"loss_type": "dft"}),
    "sft, packed": (SFTTrainer, SFTConfig, {"padding_free": True, "max_length": None}),
    "sft, autocast": (SFTTrainer, SFTConfig, {"bf16": True}),
    "dpo": (DPOTrainer, DPOConfig, {}),
    "kto": (KTOTrainer, KTOConfig, {}),
    "grpo": (GRPOTrainer, GRPOConfig, {}),
    "grpo, entropies": (GRPOTrainer, GRPOConfig, {"top_entropy_quantile": 0.5}),
    "rloo": (RLOOTrainer, RLOOConfig, {"beta": 0.0}),
}


def trainer_of(kind: type, config: type, folder: Any, tokenizer: Any, cggr: CGGRConfig, **values: Any) -> Any:
    """A routed trainer on a tiny model, with a reference model of its own where it takes one."""
    more: dict[str, Any] = {}
    if kind in ROWS_OF:
        more = {"train_dataset": Dataset.from_list([dict(row) for row in ROWS_OF[kind]]), "max_length": 32}
    if kind in (DPOTrainer, KTOTrainer):
        with torch.random.fork_rng():
            more["ref_model"] = model_for(tokenizer)
            for parameter in more["ref_model"].parameters():
                parameter.data.mul_(0.9)
    return build(kind, config, folder, tokenizer, cggr=cggr, **{"gradient_checkpointing": False} | more | values)


def updates(made: Any, name: str, vocabulary: int, count: int = 4) -> list[dict[str, Any]]:
    """Batches of equal shapes on the trainer's device, with other tokens and other labels in each."""
    if made.args.__class__ in (GRPOConfig, RLOOConfig):
        first = policy_batch(vocabulary)
        if made.args.__class__ is RLOOConfig:
            first["old_logps"] = torch.full((ROWS,), -20.0)
        if "entropies" in name:
            generator = torch.Generator().manual_seed(1)
            first["old_per_token_logps"] = torch.full((ROWS, COMPLETION), -3.0)
            first["cggr_entropies"] = torch.rand(ROWS, COMPLETION, generator=generator)
        ids = "completion_ids"
    else:
        first, ids = next(iter(made.get_train_dataloader())), "input_ids"
        first = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in first.items()}
    found = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        batch = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in first.items()}
        free = batch["labels"] != -100 if "labels" in batch else torch.ones_like(batch[ids], dtype=torch.bool)
        if "attention_mask" in batch:
            free &= batch["attention_mask"].bool()
        if "completion_mask" in batch and ids == "input_ids":
            free &= batch["completion_mask"].bool()
        new = torch.randint(3, vocabulary, batch[ids].shape, generator=generator)
        batch[ids] = torch.where(free, new, batch[ids])
        if "labels" in batch:
            batch["labels"] = torch.where(free, batch[ids], -100)
            batch["labels"][0, -3 - number :] = -100
        device = made.accelerator.device
        found.append({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
    return found
