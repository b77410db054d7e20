"""A small language model and its training on the standard library's source, for benchmarks of learning."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cggr_core import CGGRModel
from cggr_train.data import Batches
from cggr_train.demo.corpus import standard_library
from cggr_train.tokenizer import train_tokenizer

WARMUP = 50


@dataclass(frozen=True)
class Size:
    """A model, its text and its training."""

    layers: int
    hidden: int
    heads: int
    vocabulary: int
    characters: int
    batch: int
    length: int
    steps: int
    every: int
    learning_rate: float
    device: str
    tied: bool = True

    def model(self, seed: int) -> LlamaForCausalLM:
        """The model with random weights."""
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.hidden * 11 // 4,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, max_position_embeddings=self.length,
            tie_word_embeddings=self.tied,
        )  # fmt: skip
        with torch.device(self.device):
            return LlamaForCausalLM(config).train()

    def text(self) -> tuple[np.ndarray, np.ndarray]:
        """Token ids to train on, and held-out ones."""
        documents = standard_library(max_characters=self.characters)
        tokenizer = train_tokenizer(documents[:: max(1, self.characters // 4_000_000)], vocab_size=self.vocabulary)
        ids = [np.array(row, dtype=np.int64) for row in tokenizer(documents, add_special_tokens=False)["input_ids"]]
        held = max(1, len(ids) // 20)
        return np.concatenate(ids[held:]), np.concatenate(ids[:held])

    def precision(self) -> torch.autocast:
        """bfloat16 except on a CPU."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device != "cpu")


def training(wrapped: CGGRModel, size: Size, stream: np.ndarray, *, seed: int) -> Iterator[tuple[int, Tensor]]:
    """Train, yielding the number and loss of every step after its backward pass and before its update.

    Args:
        wrapped: The model.
        size: Its training; one step beyond ``size.steps`` is yielded, without its update.
        stream: Token ids to train on.
        seed: Of the order of the batches.
    """
    parameters = wrapped.model.parameters
    optimizer = torch.optim.AdamW(parameters(), lr=size.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warming = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    batches = Batches(stream, length=size.length, batch_size=size.batch, seed=seed)
    for step in range(size.steps + 1):
        input_ids = batches.get(step).to(size.device)
        with size.precision():
            loss = wrapped(input_ids, labels=input_ids)
        loss.backward()
        yield step, loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters(), 1.0)
        optimizer.step()
        warming.step()
        wrapped.step()
        optimizer.zero_grad(set_to_none=True)
