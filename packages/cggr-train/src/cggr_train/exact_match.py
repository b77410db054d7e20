"""Share of a data set's questions that a model answers exactly, by greedy decoding."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cggr_train.data import split_supervised
from cggr_train.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SLACK = 32


class Accuracy(NamedTuple):
    """How many were right.

    Attributes:
        right: Questions answered exactly.
        questions: Questions asked.
    """

    right: int
    questions: int

    @property
    def share(self) -> float:
        """Of the questions that were answered exactly."""
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
    batch_size: int = 128,
    slack: int = SLACK,
) -> Accuracy:
    """Answer every question of ``rows`` and compare with the answers that stand there.

    Args:
        model: A causal language model; its mode is put back.
        rows: Examples, int64 ``[N, S]``: the unsupervised tokens at the beginning are the question, the supervised ones
            the answer (:mod:`cggr_train.data.supervision`).
        tokenizer: Of the model.
        after: Compare what follows the last of this mark ("####"); None compares whole answers.
        device: Where the model is.
        bfloat16: Decode under bfloat16 autocast.
        batch_size: Questions that are answered at a time.
        slack: Tokens that an answer may be longer than the longest of ``rows``.

    Raises:
        InputError: If an answer of ``rows`` lacks the mark.
    """
    from transformers import GenerationConfig

    questions, answers = zip(*map(_take_apart, rows), strict=True)
    wanted = [final_answer(text, after) for text in tokenizer.batch_decode(list(answers), skip_special_tokens=True)]
    if None in wanted:
        raise InputError(f"--answer-after is {after!r}, which is not in every answer of the held-out data")
    end: Any = tokenizer.eos_token_id
    decoding = GenerationConfig(
        do_sample=False, max_new_tokens=max(map(len, answers)) + slack, eos_token_id=end, pad_token_id=end
    )
    training, right = model.training, 0
    model.eval()
    order = sorted(range(len(questions)), key=lambda number: len(questions[number]))
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            input_ids, attention_mask = _pad_left([questions[number] for number in chosen], end)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
                found: Any = model.generate(  # pyright: ignore[reportCallIssue]
                    input_ids=input_ids.to(device), attention_mask=attention_mask.to(device),
                    generation_config=decoding, use_cache=True,
                )  # fmt: skip
            texts = tokenizer.batch_decode(found[:, input_ids.shape[1] :], skip_special_tokens=True)
            given = (final_answer(text, after) for text in texts)
            right += sum(one == wanted[number] for one, number in zip(given, chosen, strict=True))
    finally:
        model.train(training)
    return Accuracy(right, len(questions))


def final_answer(text: str, after: str | None) -> str | None:
    """What is compared of an answer; None where the mark is missing.

    Separators of thousands, spaces and a full stop at the end do not count.

    Example:
        >>> final_answer("3 * 400 = 1,200. #### 1,200.", "####"), final_answer("twelve", "####")
        ('1200', None)
    """
    if after is not None:
        _, mark, text = text.rpartition(after)
        if not mark:
            return None
    return re.sub(r"(?<=\d),(?=\d{3})", "", " ".join(text.split())).removesuffix(".")


def _take_apart(row: Tensor) -> tuple[list[int], list[int]]:
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
