"""Tiny models, data and Trainers for the tests of the Trainer's integrations."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from cggr_train import CGGRConfig, CGGRTrainer

VOCAB = 64
# Named anew in transformers 5.20.
CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, name)
)


def tiny_model(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    small = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**small, **settings}))


def examples(count: int = 8, *, length: int | None = None) -> list[dict[str, list[int]]]:
    """Token ids with prompts masked, of unequal lengths unless one is given."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(count):
        size = length or 9 + 3 * (number % 4)
        input_ids = torch.randint(3, VOCAB, (size,), generator=generator).tolist()
        prompt = 2 + number % 3
        made.append({"input_ids": input_ids, "labels": [-100] * prompt + input_ids[prompt:]})
    return made


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A collator that pads on the right."""
    size = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> torch.Tensor:
        values = [list(row.get(name, [1] * len(row["input_ids"]))) for row in rows]
        return torch.tensor([row + [value] * (size - len(row)) for row in values])

    return {name: filled(name, value) for name, value in {"input_ids": 0, "labels": -100, "attention_mask": 0}.items()}


def arguments(folder: Any, **values: Any) -> TrainingArguments:
    plain = {
        "max_steps": 2, "per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "remove_unused_columns": False, "disable_tqdm": True, "logging_steps": 1, "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    return TrainingArguments(str(folder), **{**plain, **values})


def trainer(folder: Any, cggr: CGGRConfig | None = None, *, model: Any = None, kind: type = CGGRTrainer, **values: Any):
    """A Trainer on the examples; ``values`` are training arguments, but for ``data`` and ``collator``."""
    data, collator = values.pop("data", None), values.pop("collator", pad)
    more = {} if cggr is None else {"cggr": cggr}
    return kind(
        tiny_model() if model is None else model,
        arguments(folder, **values),
        train_dataset=examples() if data is None else data,
        eval_dataset=examples(6),
        data_collator=collator,
        **more,
    )


def change(before: torch.nn.Module, after: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What training did to each parameter."""
    old = dict(before.named_parameters())
    return {name: parameter.detach() - old[name].detach() for name, parameter in after.named_parameters()}


def relative_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    difference = sum((found[name] - value).square().sum() for name, value in wanted.items())
    return float((difference / sum(value.square().sum() for value in wanted.values())).sqrt())


def trained(folder: Any, cggr: CGGRConfig | None = None, **values: Any) -> dict[str, torch.Tensor]:
    """What training did to a tiny model."""
    made = trainer(folder, cggr, **values)
    before = tiny_model()
    made.train()
    return change(before, made.model)
