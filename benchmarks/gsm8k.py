"""GSM8K as the benchmarks train on it: a question by itself, or behind other questions that fill the context."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "####"
"""Precedes the final answer of every problem."""


def read_problems(path: Path) -> list[dict[str, str]]:
    """Questions and answers of a JSON Lines file of GSM8K."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{name: json.loads(line)[name] for name in ("question", "answer")} for line in lines if line]


def write_problems(path: Path, problems: Sequence[dict[str, str]]) -> Path:
    """Write problems in the form that a study reads; an existing file is left unchanged."""
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
    """Every problem, preceded by as many others with their answers as fit in ``length`` tokens.

    Args:
        problems: The problems to answer.
        others: The problems to put before it, other than itself.
        tokenizer: Counts tokens.
        length: Tokens of a sequence, including the end.
        seed: Of the choice of the others.
    """
    generator = random.Random(seed)
    context = [f"{other['question']}\n{other['answer']}\n\n" for other in others]
    sizes = _sizes(context, tokenizer)
    own = _sizes([f"{problem['question']}\n{problem['answer']}" for problem in problems], tokenizer)
    found = []
    for problem, size in zip(problems, own, strict=True):
        room, parts = length - size - 32, []  # tokens can differ where texts are joined
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
