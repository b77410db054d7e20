"""CGGR in a loop of your own: ``python examples/plain_loop.py MODEL TEXT_FILE OUT``. It needs ``cggr``."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cggr import CGGRModel


def main(name: str, text: str, out: str, *, steps: int = 100, batch_size: int = 8, length: int = 512) -> None:
    """Fine-tune on random stretches of a text, with the backward pass for a quarter of the tokens."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokens = torch.tensor(tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"])
    model = CGGRModel(AutoModelForCausalLM.from_pretrained(name), min_tokens_ratio=0.25, warmup_steps=steps // 10)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
    for step in range(steps):
        starts = torch.randint(len(tokens) - length, (batch_size, 1))
        input_ids = tokens[starts + torch.arange(length)].to(model.device)
        loss = model(input_ids, labels=input_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.step()  # advances the keep ratio
        print(f"step {step + 1}: loss {loss:.3f}, kept {model.metrics['keep_ratio']:.0%}")
    model.save_pretrained(out)  # the plain model
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
