"""CGGR in front of TRL's SFTTrainer, on prompts and completions.

``python examples/sft.py --model MODEL --data DATA.jsonl --output_dir OUT --selection supervised``; every line of the
data has a ``prompt`` and a ``completion``. With ``--selection supervised`` exactly the completions are kept, and long
prompts cost a forward pass only; ``--selection stratified --min_tokens_ratio 0.25`` keeps a quarter of the completions.
It needs ``cggr-train`` and ``trl``; without a GPU add ``--use_cpu true --bf16 false``, since TRL asks for bfloat16.
"""

import sys
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer

from cggr_train import CGGRConfig, CGGRMixin


class RoutedSFTTrainer(CGGRMixin, SFTTrainer):
    """SFTTrainer on the tokens worth learning from."""


@dataclass
class Data:
    """What to train, and on what."""

    model: str = field(metadata={"help": "Directory of a Hugging Face model."})
    data: str = field(metadata={"help": "JSON Lines file with prompt and completion."})


def main(arguments: list[str]) -> None:
    """Fine-tune on prompts and completions."""
    parser = HfArgumentParser((Data, SFTConfig, CGGRConfig))
    data, training, cggr = parser.parse_args_into_dataclasses(arguments)
    trainer = RoutedSFTTrainer(
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
