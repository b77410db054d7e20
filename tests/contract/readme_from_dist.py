"""Run the README's Python examples on installed wheels, with a tiny model and tokenizer in place of the reader's own.

Run by ``nox -s release`` with the Python of an environment that has only the wheels of this project and trl.
"""

import os
import re
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from cggr_train.tokenizer import train_tokenizer

README = Path(__file__).parents[2] / "README.md"
PACKAGES = ("cggr", "cggr-core", "cggr-kernels", "cggr-flash", "cggr-moe", "cggr-train")


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def main() -> None:
    for package in PACKAGES:
        found = distribution(package)
        origin = found.read_text("direct_url.json") or ""
        if '"editable": true' in origin or ".whl" not in origin:
            raise SystemExit(
                f"{package} {found.version} was not installed from a wheel: {origin or 'no direct_url.json'}"
            )
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    if not blocks:
        raise SystemExit("the README has no Python example")
    AutoModelForCausalLM.from_pretrained = lambda name: tiny_model()
    os.chdir(tempfile.mkdtemp())
    torch.manual_seed(0)
    input_ids = torch.randint(0, 257, (2, 16))
    names = {
        "input_ids": input_ids,
        "labels": input_ids.clone(),
        "attention_mask": torch.ones_like(input_ids),
        "tokenizer": train_tokenizer(["0 + 1 = 2"], vocab_size=257),
        "dataset": Dataset.from_list([{"prompt": f"{n} + {n} = ", "completion": str(2 * n)} for n in range(4)]),
        "args": SFTConfig(max_steps=1, use_cpu=True, bf16=False, report_to="none", save_strategy="no"),
    }
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"README.md, example {number}", "exec"), names)
    if not torch.isfinite(names["loss"]):
        raise SystemExit(f"the README's loss is {names['loss']}")
    print(f"{len(blocks)} examples of the README ran on the installed wheels")


if __name__ == "__main__":
    main()
