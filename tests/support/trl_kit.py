"""Tiny TRL trainers, fixed batches for them, and the results of their own loss with gradients stopped by hand."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from cggr_train import CGGRConfig, CGGRMixin
from tests.support.trainer_kit import tiny_model

QUIET = [
    pytest.mark.filterwarnings("ignore::FutureWarning:(trl|transformers|peft)[.]"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(trl|transformers|datasets|multiprocess)[.]"),
]
PROMPTS = [f"def function_{n}(a, b):\n" for n in range(4)]
# Sizes of the fixed batches: rows, prompt, completion.
ROWS, PROMPT, COMPLETION = 4, 6, 9


def routed(kind: type) -> type:
    """The two lines that a user writes."""
    return type(f"Routed{kind.__name__}", (CGGRMixin, kind), {})


def model_for(tokenizer: Any, **settings: Any) -> Any:
    model = tiny_model(vocab_size=len(tokenizer), **settings)
    with torch.no_grad():  # weights as if trained, so that entropies and ratios differ
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model


def trained_text(text: str) -> float:
    """A reward that differs between completions."""
    return float(sum(map(ord, text)) % 5)


def build(kind: type, config: type, folder: Any, tokenizer: Any, *, cggr: CGGRConfig | None, **values: Any) -> Any:
    """A trainer of TRL, plain or (with ``cggr``) routed, on a tiny model."""
    plain = {
        "max_steps": 1, "per_device_train_batch_size": ROWS, "optim": "sgd", "learning_rate": 0.5,
        "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "logging_steps": 1, "bf16": False, "dataloader_pin_memory": False, "disable_tqdm": True,
    }  # fmt: skip
    model, peft_config = values.pop("model", None), values.pop("peft_config", None)
    more: dict[str, Any] = {
        name: values.pop(name) for name in ("train_dataset", "eval_dataset", "data_collator") if name in values
    }
    if hasattr(config, "num_generations"):
        plain.update(num_generations=2, max_completion_length=COMPLETION)
        more["reward_funcs"] = lambda completions, **_: [trained_text(text) for text in completions]
        more.setdefault("train_dataset", Dataset.from_list([{"prompt": text} for text in PROMPTS]))
    for name in ("ref_model", "teacher_model"):
        if name in values:
            more[name] = values.pop(name)
    if cggr is not None:
        kind, more["cggr"] = routed(kind), cggr
    made = kind(
        model_for(tokenizer) if model is None else model, args=config(str(folder), **{**plain, **values}),
        processing_class=tokenizer, peft_config=peft_config, **more,
    )  # fmt: skip
    made.model.train()
    made.current_gradient_accumulation_steps = made.args.gradient_accumulation_steps
    return made


def policy_batch(vocabulary: int, *, advantages: Any = (1.0, -0.5, 0.0, 0.7), ragged: bool = True) -> dict[str, Any]:
    """A batch of GRPO's update: left-padded prompts, right-padded completions."""
    generator = torch.Generator().manual_seed(3)
    prompt_mask = torch.ones(ROWS, PROMPT, dtype=torch.long)
    completion_mask = torch.ones(ROWS, COMPLETION, dtype=torch.long)
    if ragged:
        for row in range(ROWS):
            prompt_mask[row, : row % 3] = 0
            completion_mask[row, COMPLETION - 2 * (row % 2) :] = 0
    return {
        "prompt_ids": torch.randint(3, vocabulary, (ROWS, PROMPT), generator=generator),
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, vocabulary, (ROWS, COMPLETION), generator=generator),
        "completion_mask": completion_mask,
        "advantages": torch.tensor(advantages),
        "num_items_in_batch": completion_mask.sum(),
    }


def step(trainer: Any, inputs: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of one micro-batch."""
    trainer.model.zero_grad(set_to_none=True)
    inputs = dict(inputs)
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), {
        name: parameter.grad.clone()
        for name, parameter in trainer.model.named_parameters()
        if parameter.grad is not None
    }


@contextmanager
def stopped_by_hand(model: Any, keep: Tensor, *, detached: bool = False) -> Iterator[None]:
    """Every layer of a plain model sees ``where(keep, h, h.detach())``, and its log-probabilities end there too.

    That is what mode ``kv`` means, by autograd alone. ``detached`` is the layers' other tokens without any gradient.
    """
    handles = []

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0]
        return (torch.where(keep[:, :, None], hidden, hidden.detach()), *args[1:]), kwargs

    layers = next(module for module in model.modules() if hasattr(module, "layers")).layers
    for layer in layers:
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        if detached:
            for name in ("k_proj", "v_proj"):
                projection = getattr(layer.self_attn, name)
                handles.append(
                    projection.register_forward_hook(
                        lambda module, args, output: torch.where(keep[:, :, None], output, output.detach())
                    )
                )
    fused = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = fused(*args, **kwargs)
        if kwargs.get("fused_lm_head") and torch.is_grad_enabled():
            for name in ("log_probs", "entropy"):
                if output.get(name) is not None:
                    value = output[name]
                    output[name] = torch.where(keep[:, :-1], value, value.detach())
        return output

    model.__dict__["forward"] = forward
    try:
        yield
    finally:
        model.__dict__["forward"] = fused
        for handle in handles:
            handle.remove()


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm."""
    assert found.keys() == wanted.keys()
    difference = sum(float((found[name] - value).square().sum()) for name, value in wanted.items())
    return (difference / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5
