"""GSM8K as the benchmarks train on it: a question by itself, or behind other questions that fill the context."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "####"
"""In front of the final answer of every problem."""


def read_problems(path: Path) -> list[dict[str, str]]:
    """Questions and answers of a JSON Lines file of GSM8K."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{name: json.loads(line)[name] for name in ("question", "answer")} for line in lines if line]


def write_problems(path: Path, problems: Sequence[dict[str, str]]) -> Path:
    """Write them so that a study reads them; a file that is there already is left as it is."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(problem) + "\n" for problem in problems), encoding="utf-8")
        temporary.replace(path)
    return path


def among_others(
    problems: Sequence[dict[str, str]], others: Sequence[dict[str, str]], tokenizer: "PreTrainedTokenizerBase",
    *, length: int, seed: int,
) -> list[dict[str, str]]:  # fmt: skip
    """Every problem behind as many other ones, with their answers, as ``length`` tokens have room for.

    Args:
        problems: What is asked.
        others: What stands before it; a problem is not put before itself.
        tokenizer: Counts tokens.
        length: Tokens of a sequence, end included.
        seed: Of which others are taken.
    """
    generator = random.Random(seed)
    context = [f"{other['question']}\n{other['answer']}\n\n" for other in others]
    sizes = _sizes(context, tokenizer)
    own = _sizes([f"{problem['question']}\n{problem['answer']}" for problem in problems], tokenizer)
    found = []
    for problem, size in zip(problems, own, strict=True):
        room, parts = length - size - 32, []  # where texts are joined, tokens can come out otherwise
        while True:
            number = generator.randrange(len(context))
            if others[number]["question"] == problem["question"]:
                continue
            if sizes[number] > room:
                break
            parts.append(context[number])
            room -= sizes[number]
        found.append({"question": "".join(parts) + problem["question"], "answer": problem["answer"]})
    return found


def _sizes(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    encoded: Any = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return [len(ids) for ids in encoded["input_ids"]]
