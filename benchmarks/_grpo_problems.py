"""Problems of GSM8K as prompts of a chat model, and the reward of an answer, for :mod:`benchmarks.grpo_gsm8k`."""

import re
from dataclasses import dataclass
from typing import Any

from benchmarks.gsm8k import MARK

_NUMBER = re.compile(rf"{MARK}\s*\$?(-?[\d,]*\.?\d+)")
END_OF_START = 1000
"""This many training problems are used to train the initial policy; the runs train on the others."""


@dataclass(frozen=True)
class Task:
    """Problems as prompts, and their answers."""

    prompts: list[str]
    answers: list[str]


def right(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 if the last number after ``####`` is the answer, else 0."""
    return [float(number_of(text) == float(wanted)) for text, wanted in zip(completions, answer, strict=True)]


def number_of(text: str) -> float | None:
    """The last number after ``####``."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def form(problem: dict[str, str], tokenizer: Any) -> tuple[str, str]:
    """A problem as a user's turn, and its answer without GSM8K's calculator annotations."""
    turns = [{"role": "user", "content": problem["question"]}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return prompt, re.sub("<<.*?>>", "", problem["answer"])


def task(problems: list[dict[str, str]], tokenizer: Any, longest: int) -> Task:
    """The problems whose prompts have at most ``longest`` tokens.

    Args:
        problems: Of GSM8K.
        tokenizer: With a chat template.
        longest: Tokens.
    """
    made = [(form(problem, tokenizer)[0], number_of(problem["answer"])) for problem in problems]
    sizes = map(len, tokenizer([prompt for prompt, _ in made], add_special_tokens=False)["input_ids"])
    kept = [(prompt, str(number)) for (prompt, number), size in zip(made, sizes, strict=True) if size <= longest]
    return Task([prompt for prompt, _ in kept], [answer for _, answer in kept])


def with_end_of_turn(tokenizer: Any) -> Any:
    """The tokenizer, with the token that ends an answer as its end-of-sequence token; a GGUF file may name another."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(encode(tokenizer, text.rpartition("answer")[2])[0])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def encode(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt that already contains its special tokens."""
    return tokenizer(prompt, add_special_tokens=False)["input_ids"]
