"""Exact-match accuracy of greedy decoding on a data set of questions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cggr_train.data import split_supervised
from cggr_train.errors import InputError
from cggr_train.grouped_attention import grouped_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SLACK = 32
TOKENS = 2**18
"""Limit on the tokens of a batch, for its key-value cache: 6 GB for a 135M model."""


class Accuracy(NamedTuple):
    """Number of right answers.

    Attributes:
        right: Questions answered exactly.
        questions: Questions asked.
    """

    right: int
    questions: int

    @property
    def share(self) -> float:
        """Share of the questions that were answered exactly."""
        return self.right / self.questions


@torch.no_grad()
def exact_match(
    model: PreTrainedModel,
    rows: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    after: str | None = None,
    device: torch.device,
    bfloat16: bool = False,
    batch_size: int = 512,
    slack: int = SLACK,
    tokens_per_turn: int = 128,
) -> Accuracy:
    """Answer every question of ``rows`` and compare with the reference answers in it.

    Args:
        model: A causal language model; its mode is restored.
        rows: Examples, int64 ``[N, S]``: the unsupervised tokens at the beginning are the question, the supervised ones
            the answer (:mod:`cggr_train.data.supervision`).
        tokenizer: Of the model.
        after: Compare the text after the last of this marker ("####"); None compares whole answers.
        device: Where the model is.
        bfloat16: Decode under bfloat16 autocast.
        batch_size: Questions answered at a time, or fewer if they are long (:data:`TOKENS`).
        slack: Tokens by which an answer may exceed the longest of ``rows``.
        tokens_per_turn: Finished questions leave the batches after this many tokens.

    Raises:
        InputError: If an answer of ``rows`` lacks the marker.
    """
    end: Any = tokenizer.eos_token_id
    questions, answers = zip(*map(_split_question, rows), strict=True)
    wanted = right_answers(rows, tokenizer, after=after)
    said: list[list[int]] = [[] for _ in questions]
    unfinished, most = list(range(len(questions))), max(map(len, answers)) + slack
    training = model.training
    model.eval()
    try:
        with grouped_attention(model), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
            for done in range(0, most, tokens_per_turn):
                texts = [questions[number] + said[number] for number in unfinished]
                added = _continue(
                    model, texts, end=end, tokens=min(tokens_per_turn, most - done), device=device,
                    batch_size=batch_size,
                )  # fmt: skip
                for number, more in zip(unfinished, added, strict=True):
                    said[number] += more
                unfinished = [
                    number for number, more in zip(unfinished, added, strict=True)
                    if end not in more and len(more) == tokens_per_turn
                ]  # fmt: skip
                if not unfinished:
                    break
    finally:
        model.train(training)
    given = [final_answer(text, after) for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
    return Accuracy(sum(one == other for one, other in zip(given, wanted, strict=True)), len(questions))


def right_answers(rows: Tensor, tokenizer: PreTrainedTokenizerBase, *, after: str | None) -> list[str]:
    """The compared parts of the reference answers in ``rows``, see :func:`exact_match`.

    Raises:
        InputError: If an answer lacks the marker.
    """
    answers = [_split_question(row)[1] for row in rows]
    texts: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)
    found = [final_answer(text, after) for text in texts]
    right = [text for text in found if text is not None]
    lacking = len(found) - len(right)
    if lacking:
        first = texts[found.index(None)]
        raise InputError(
            f"--answer-after is {after!r}, but {lacking:,} of the {len(found):,} held-out answers lack it (for "
            f"example {shorten(first, 80)!r}); give a marker that all of them contain, or leave it out to compare "
            "whole answers"
        )
    return right


def _continue(
    model: PreTrainedModel, texts: Sequence[list[int]], *, end: int, tokens: int, device: torch.device, batch_size: int
) -> list[list[int]]:
    """Decode greedily up to this many tokens or through the end-of-text token."""
    from transformers import GenerationConfig

    decoding = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=end, pad_token_id=end)
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    said: dict[int, list[int]] = {}
    while order:
        longest = len(texts[order[-1]]) + tokens
        chosen = [order.pop() for _ in range(min(batch_size, max(1, TOKENS // longest), len(order)))]
        input_ids, attention_mask = _pad_left([texts[number] for number in chosen], end)
        found: Any = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), generation_config=decoding,
            use_cache=True,
        )  # fmt: skip
        for number, row in zip(chosen, found[:, input_ids.shape[1] :].tolist(), strict=True):
            said[number] = row[: row.index(end) + 1] if end in row else row
    return [said[number] for number in range(len(texts))]


def final_answer(text: str, after: str | None) -> str | None:
    """The part of an answer that is compared; None if the marker is missing.

    Thousands separators, spaces and a final full stop are ignored.

    Example:
        >>> final_answer("3 * 400 = 1,200. #### 1,200.", "####"), final_answer("twelve", "####")
        ('1200', None)
    """
    if after is not None:
        _, mark, text = text.rpartition(after)
        if not mark:
            return None
    return re.sub(r"(?<=\d),(?=\d{3})", "", " ".join(text.split())).removesuffix(".")


def _split_question(row: Tensor) -> tuple[list[int], list[int]]:
    """Tokens of the question and of the answer."""
    input_ids, labels = split_supervised(row[None])
    supervised = (labels[0] >= 0).nonzero().flatten()
    first, last = int(supervised[0]), int(supervised[-1])
    return input_ids[0, :first].tolist(), input_ids[0, first : last + 1].tolist()


def _pad_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask
