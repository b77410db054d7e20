"""CGGR in the Hugging Face Trainer: two extra lines.

``python examples/trainer.py --model MODEL --text TEXT_FILE --output_dir OUT --min_tokens_ratio 0.25``, or the same
settings in a YAML file: ``python examples/trainer.py settings.yaml``. On several GPUs with ``torchrun`` or ``accelerate
launch`` before it. It needs ``cggr-train``.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments, default_data_collator

from cggr_train import CGGRConfig, CGGRTrainer


@dataclass
class Data:
    """What to train, and on what."""

    model: str = field(metadata={"help": "Directory of a Hugging Face model."})
    text: Path = field(metadata={"help": "Text file."})
    length: int = field(default=512, metadata={"help": "Tokens of a sequence."})


def main(arguments: list[str]) -> None:
    """Fine-tune on a text file."""
    parser = HfArgumentParser((Data, TrainingArguments, CGGRConfig))
    if len(arguments) == 1 and arguments[0].endswith((".yaml", ".yml")):
        data, training, cggr = parser.parse_yaml_file(arguments[0])
    else:
        data, training, cggr = parser.parse_args_into_dataclasses(arguments)
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    tokens = tokenizer(Path(data.text).read_text(encoding="utf-8"))["input_ids"]
    rows = [tokens[start : start + data.length] for start in range(0, len(tokens) - data.length + 1, data.length)]
    trainer = CGGRTrainer(
        model=AutoModelForCausalLM.from_pretrained(data.model),
        args=training,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        data_collator=default_data_collator,
        processing_class=tokenizer,
        cggr=cggr,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1:])
