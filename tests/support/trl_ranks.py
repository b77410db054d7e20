"""One rank of an update of TRL's trainers under DDP or FSDP2, compared with one process on all rows."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from cggr_train import CGGRConfig
from cggr_train.tokenizer import train_tokenizer
from tests.support.trainer_ranks import FSDP
from tests.support.trl_kit import ROWS, build, error, model_for, policy_batch, step

ADVANTAGES = (1.0, -0.5, 0.0, 0.0)
CASES: dict[str, tuple[type, type, CGGRConfig, dict[str, Any]]] = {
    "grpo": (GRPOTrainer, GRPOConfig, CGGRConfig(), {"loss_type": "grpo", "top_entropy_quantile": 0.4}),
    "grpo, exact": (GRPOTrainer, GRPOConfig, CGGRConfig(gradient="exact"), {"loss_type": "grpo"}),
    "grpo, ratios of sequences": (
        GRPOTrainer, GRPOConfig, CGGRConfig(), {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "sft": (SFTTrainer, SFTConfig, CGGRConfig(selection="supervised"), {}),
    "dpo": (DPOTrainer, DPOConfig, CGGRConfig(), {}),
}  # fmt: skip
COLUMNS = {
    SFTTrainer: {"prompt": "def f(a):\n", "completion": "    return a\n"},
    DPOTrainer: {"prompt": "def f(a):\n", "chosen": "    return a\n", "rejected": "    return 1\n"},
}


def made_for(name: str, folder: Path, **values: Any) -> tuple[Any, dict[str, Tensor]]:
    """A trainer, and all rows of its batch."""
    kind, config, cggr, settings = CASES[name]
    tokenizer = train_tokenizer(["def function(a, b):\n    return a * b\n" * 9], vocab_size=300)
    if kind in COLUMNS:
        values["train_dataset"] = Dataset.from_list([COLUMNS[kind]] * ROWS)
    if kind is DPOTrainer:
        values["ref_model"] = model_for(tokenizer)
        for parameter in values["ref_model"].parameters():  # another policy, so that not every margin is 0
            parameter.data.mul_(0.9)
    made = build(kind, config, folder, tokenizer, cggr=cggr, **settings, **values)
    batch = policy_batch(len(tokenizer), advantages=ADVANTAGES)
    if kind in COLUMNS:
        batch = joined(batch, labels=kind is SFTTrainer)
    return made, {key: value.to(made.accelerator.device) for key, value in batch.items()}


def joined(batch: dict[str, Tensor], *, labels: bool) -> dict[str, Tensor]:
    """Prompts and completions as one, with labels or a completion mask."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    of_completion = torch.cat([torch.zeros_like(batch["prompt_mask"]), batch["completion_mask"]], dim=1)
    beside = {"labels": ids.masked_fill(of_completion == 0, -100)} if labels else {"completion_mask": of_completion}
    return {"input_ids": ids, "attention_mask": mask, **beside}


def one_process(folder: Path, **values: Any) -> None:
    """Leave every gradient of all rows in ``folder``."""
    for name in CASES:
        made, inputs = made_for(name, folder, **values)
        found = step(made, inputs)[1]
        torch.save({key: value.cpu() for key, value in found.items()}, folder / f"{name}.pt")


def on_a_rank(engine: str, alone: Path, folder: Path, limit: float = 1e-5, **values: Any) -> None:
    """Compare the gradients of all ranks with those of one process in ``alone``."""
    on_cpu = values.get("use_cpu", True)
    # Accelerate has FSDP2 for accelerators alone; on a CPU the layers are sharded by hand.
    more: dict[str, Any] = {"fsdp": True, "fsdp_config": FSDP} if engine == "FSDP2" and not on_cpu else {}
    wrong = []
    for name, (kind, *_) in CASES.items():
        made, inputs = made_for(name, folder, per_device_train_batch_size=ROWS // 2, **values, **more)
        rank = made.accelerator.process_index
        # Chosen completions come first, then the rejected ones of the same pairs.
        rows = [rank, rank + 2] if kind is DPOTrainer else [2 * rank, 2 * rank + 1]
        mine = {key: value[rows] if value.dim() else value for key, value in inputs.items()}
        if engine == "FSDP2" and on_cpu:
            model = sharded(made.model)
        else:
            made.create_optimizer()  # which FSDP2 is prepared with
            model, _ = made.accelerator.prepare(made.model, made.optimizer)
        assert (type(model).__name__ == "DistributedDataParallel") == (engine == "DDP")
        items = {"num_items_in_batch": (inputs["labels"] != -100).sum()} if kind is SFTTrainer else {}
        made.compute_loss(model, mine, **items).backward()
        parameters = made.accelerator.unwrap_model(model).named_parameters()
        found = {key: whole(parameter.grad).cpu() for key, parameter in parameters if parameter.grad is not None}
        difference = error(found, torch.load(alone / f"{name}.pt"))
        print(f"{engine}, {name}: {difference:.1e}", flush=True)
        wrong += [f"{name}: {difference:.1e}"] if difference > limit else []
    assert not wrong, ", ".join(wrong)


def sharded(model: Any) -> Any:
    """The model with every layer, and the modules around them, sharded over the ranks."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


def whole(grad: Tensor) -> Tensor:
    """The whole of a gradient that may be sharded over ranks."""
    return grad.full_tensor() if isinstance(grad, DTensor) else grad


if __name__ == "__main__":
    if os.environ.get("WORLD_SIZE", "1") == "1":
        one_process(Path(sys.argv[2]), use_cpu=False)
    else:
        on_a_rank(sys.argv[1], *map(Path, sys.argv[2:]), limit=1e-4, use_cpu=False)
