"""The initial policy of all runs of :mod:`benchmarks.grpo_gsm8k`: pretrained, and fine-tuned on the form of answers."""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from benchmarks._grpo_problems import END_OF_START, encode, form, right, task, with_end_of_turn
from benchmarks.gsm8k import read_problems
from cggr_train.presets import load_model
from cggr_train.tokenizer import load_tokenizer

_BATCH = 16
_RATE = 2e-5
_WARMUP = 10
_CHECKED = 64


def policy(options: argparse.Namespace) -> Path:
    """Folder of the policy, created if it does not exist: a GGUF file is read once rather than by every run.

    The model is trained on the answers of the first training problems, which no run trains on, so that it answers
    briefly and in the rewarded form: it cannot learn from a reward it never gets.

    Args:
        options: Of the command.
    """
    steps = options.start_steps
    written = options.output / "models" / f"{options.model.name}_{steps}"
    if not written.exists():
        temporary = written.with_suffix(".part")
        tokenizer = with_end_of_turn(load_tokenizer(str(options.model)))
        model: Any = load_model(str(options.model)).to("cuda" if torch.cuda.is_available() else "cpu")
        if steps:
            fine_tune(model, tokenizer, options.gsm8k, steps=steps)
        check(model, tokenizer, options)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(written)
    return written


def fine_tune(model: Any, tokenizer: Any, gsm8k: Path, *, steps: int) -> None:
    """Fine-tune with AdamW on the cross-entropy of the answers.

    Args:
        model: Trained in place.
        tokenizer: Of the model.
        gsm8k: Folder with ``train.jsonl``.
        steps: Of 16 problems each.
    """
    problems = read_problems(gsm8k / "train.jsonl")[:END_OF_START]
    rows = []
    for problem in problems:
        prompt, answer = form(problem, tokenizer)
        said = [*encode(tokenizer, answer), tokenizer.eos_token_id]
        rows.append((encode(tokenizer, prompt), said))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0)
    generator = random.Random(0)
    device = model.device
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(1.0, (step + 1) / _WARMUP)
        batch = generator.sample(rows, min(_BATCH, len(rows)))
        ids = pad_sequence([torch.tensor(prompt + said) for prompt, said in batch], batch_first=True)
        labels = pad_sequence(
            [torch.tensor([-100] * len(prompt) + said) for prompt, said in batch], batch_first=True, padding_value=-100
        )
        # Padding comes after the text, where no labelled token attends to it: no mask is needed.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(ids.to(device), labels=labels.to(device)).loss
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():
            raise SystemExit(f"start, step {step}: the gradient's norm is {norm.item()}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step + 1 == steps:
            print(f"start, step {step}: loss of answers {loss.item():.3f}", flush=True)


@torch.no_grad()
def check(model: Any, tokenizer: Any, options: argparse.Namespace) -> None:
    """Stop if the policy, decoded by transformers, earns almost no reward: nothing could be learned from it.

    Args:
        model: The policy.
        tokenizer: Of the model.
        options: Of the command.
    """
    heldout = task(read_problems(options.gsm8k / "test.jsonl"), tokenizer, options.prompt)
    prompts, answers = heldout.prompts[:_CHECKED], heldout.answers[:_CHECKED]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    model.eval()
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda"):
        said = model.generate(
            **batch, max_new_tokens=options.completion, do_sample=False, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    texts = tokenizer.batch_decode(said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    share = sum(right(texts, answers)) / len(texts)
    for text, answer in zip(texts[:3], answers, strict=False):
        print(f"start, an answer ({answer} is right): {text!r}", flush=True)
    print(f"start: {share:.1%} of {len(texts)} answers are right", flush=True)
    if share < options.least_right:
        raise SystemExit(f"the initial policy answers {share:.1%} correctly, less than {options.least_right:.1%}")
