"""DPO with gradients for the completions only; a pair's prompt runs once and costs a forward pass.

``python examples/dpo.py --model MODEL --data DATA.jsonl --output_dir OUT``; every line of the data has a ``prompt``, a
``chosen`` and a ``rejected`` completion. Needs ``cggr-train`` and ``trl``; without a GPU add ``--use_cpu true --bf16
false``, since TRL asks for bfloat16.
"""

import sys
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import DPOConfig, DPOTrainer

from cggr_train import CGGRConfig, CGGRMixin


class RoutedDPOTrainer(CGGRMixin, DPOTrainer):
    """DPOTrainer whose prompts are forward-only."""


@dataclass
class Data:
    """What to train, and on what."""

    model: str = field(metadata={"help": "Directory of a Hugging Face model."})
    data: str = field(metadata={"help": "JSON Lines file with prompt, chosen and rejected."})


def main(arguments: list[str]) -> None:
    """Train on preferences."""
    parser = HfArgumentParser((Data, DPOConfig, CGGRConfig))
    data, training, cggr = parser.parse_args_into_dataclasses(arguments)
    trainer = RoutedDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(data.model),
        args=training,
        train_dataset=load_dataset("json", data_files=data.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(data.model),
        cggr=cggr,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1:])
