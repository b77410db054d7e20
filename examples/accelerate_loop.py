"""CGGR with Accelerate: ``accelerate launch examples/accelerate_loop.py MODEL TEXT_FILE OUT``.

It needs ``cggr`` and ``accelerate``. One process or many, DDP or FSDP2, any mixed precision: what Accelerate prepares
is the plain model, and the routed step runs inside its call. The loss is divided by the countable tokens of all
micro-batches and ranks, and rows are numbered across them, so that a step is the same however it is split.
"""

import contextlib
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from cggr import CGGRModel


def main(
    name: str, text: str, out: str, *, steps: int = 100, accumulate: int = 2, batch_size: int = 4, length: int = 512
) -> None:
    """Fine-tune on a text, with the backward pass for a quarter of the tokens."""
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokens = torch.tensor(tokenizer(Path(text).read_text(encoding="utf-8"))["input_ids"])
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    model = AutoModelForCausalLM.from_pretrained(name)
    routed = CGGRModel(model, min_tokens_ratio=0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    order = torch.Generator().manual_seed(0)  # the same on every rank, of which each takes its share
    batches = DataLoader(rows, batch_size, shuffle=True, drop_last=True, generator=order)
    model, optimizer, batches = accelerator.prepare(model.train(), optimizer, batches)
    stream = endlessly(batches)
    for step in range(steps):
        micro_batches = [next(stream) for _ in range(accumulate)]
        mine = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in micro_batches)
        num_items = accelerator.reduce(torch.tensor(mine, device=accelerator.device), "sum")
        for number, input_ids in enumerate(micro_batches):
            last = number == accumulate - 1
            place = (number * accelerator.num_processes + accelerator.process_index) * batch_size
            with contextlib.nullcontext() if last else accelerator.no_sync(model):
                with routed.routed_forward(), accelerator.autocast():
                    loss = model(input_ids, labels=input_ids, num_items=num_items, draw=step, first_row=place)
                accelerator.backward(loss * accelerator.num_processes)  # gradients are averaged over the ranks
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        routed.step()
        accelerator.print(f"step {step + 1}: kept {routed.metrics['keep_ratio']:.0%}")
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(out, state_dict=state)  # the plain model
        tokenizer.save_pretrained(out)
    accelerator.end_training()


def endlessly(batches):
    """Repeat the data indefinitely."""
    while True:
        yield from batches


if __name__ == "__main__":
    main(*sys.argv[1:])
