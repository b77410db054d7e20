"""On-policy distillation on half of the completion tokens: those where the student is least certain.

``python examples/distillation.py --model STUDENT --teacher TEACHER --data DATA.jsonl --output_dir OUT``; every line of
the data has a ``prompt``, and both models have the same tokenizer. ``--scoring divergence`` keeps the tokens where
student and teacher differ most instead, ``--min_tokens_ratio 0.3`` fewer of them. Needs ``cggr-train`` and ``trl``;
without a GPU add ``--use_cpu true --bf16 false``, since TRL asks for bfloat16.
"""

import sys
from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser
from trl import DistillationConfig, DistillationTrainer

from cggr_train import CGGRConfig, CGGRMixin


class RoutedDistillationTrainer(CGGRMixin, DistillationTrainer):
    """DistillationTrainer on the tokens worth distilling."""


@dataclass
class Data:
    """What to train, and on what."""

    model: str = field(metadata={"help": "Directory of the student, a Hugging Face model."})
    teacher: str = field(metadata={"help": "Directory of the teacher."})
    data: str = field(metadata={"help": "JSON Lines file with prompt."})


def main(arguments: list[str]) -> None:
    """Distil a teacher into a student, on the student's own completions."""
    parser = HfArgumentParser((Data, DistillationConfig, CGGRConfig))
    data, training, cggr = parser.parse_args_into_dataclasses(arguments)
    trainer = RoutedDistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(data.model),
        teacher_model=AutoModelForCausalLM.from_pretrained(data.teacher),
        args=training,
        train_dataset=load_dataset("json", data_files=data.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(data.model),
        cggr=cggr,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1:])
