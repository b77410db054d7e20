"""GRPO on the tokens that its loss uses: high-entropy completion tokens, in rows with an advantage.

``python examples/grpo.py --model MODEL --data DATA.jsonl --output_dir OUT --top_entropy_quantile 0.2``; every line of
the data has a ``prompt`` and an ``answer``, and a completion is rewarded for ending in the answer. It needs
``cggr-train`` and ``trl``; without a GPU add ``--use_cpu true --bf16 false``, since TRL asks for bfloat16.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import GRPOConfig, GRPOTrainer

from cggr_train import CGGRConfig, CGGRMixin


class RoutedGRPOTrainer(CGGRMixin, GRPOTrainer):
    """GRPOTrainer whose update covers only tokens with an advantage."""


@dataclass
class Data:
    """What to train, and on what."""

    model: str = field(metadata={"help": "Directory of a Hugging Face model."})
    data: str = field(metadata={"help": "JSON Lines file with prompt and answer."})


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for a completion that ends in the answer, else 0."""
    return [float(text.strip().endswith(wanted)) for text, wanted in zip(completions, answer, strict=True)]


def main(arguments: list[str]) -> None:
    """Train by reward."""
    parser = HfArgumentParser((Data, GRPOConfig, CGGRConfig))
    data, training, cggr = parser.parse_args_into_dataclasses(arguments)
    trainer = RoutedGRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(data.model),
        reward_funcs=right,
        args=training,
        train_dataset=load_dataset("json", data_files=data.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(data.model),
        cggr=cggr,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1:])
