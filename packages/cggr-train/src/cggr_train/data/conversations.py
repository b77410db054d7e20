"""Conversations in a model's own chat template, one per row, with the assistant's turns supervised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from cggr_train.data.documents import Documents
from cggr_train.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"


class Conversations(Documents):
    """Documents whose field is a list of messages, each with the strings ``role`` and ``content``.

    Every record is the list as JSON. A conversation without an assistant's turn is a bad line.
    """

    def _parts(self, record: object, where: str) -> tuple[str, ...] | None:
        (key,) = self.fields
        messages = record.get(key) if isinstance(record, dict) else None
        wanted = f"{where}: {key!r} must be a list of messages, each with the strings 'role' and 'content'"
        if isinstance(record, dict) and key not in record:
            wanted += f", got no such key (it has {', '.join(record) or 'none'}; see --messages)"
        elif not isinstance(messages, list) or not messages:
            wanted += f", got {_shown(messages)}"
        if not isinstance(messages, list) or not messages:
            self._skip_or_raise(wanted)
            return None
        for number, message in enumerate(messages, start=1):
            texts = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
            if not all(isinstance(text, str) for text in texts):
                self._skip_or_raise(f"{wanted}, but message {number} is {_shown(message)}")
                return None
        if not any(message["role"] == ASSISTANT for message in messages):
            self._skip_or_raise(
                f"{where}: no message in {key!r} has the role {ASSISTANT!r}, so there is nothing to train on"
            )
            return None
        return (json.dumps([{name: message[name] for name in ("role", "content")} for message in messages]),)


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]} …"


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that has no chat template.

    Raises:
        InputError: If it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "--messages needs a chat template, but the tokenizer has none; use a chat model, or --field for plain text"
        )


def conversation_rows(
    examples: list[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[np.ndarray | None]:
    """Rows of conversations as :func:`cggr_train.data.examples.build_example_store` writes them.

    Args:
        examples: Conversations as JSON.
        tokenizer: With a chat template.
        length: Tokens of a row; None is yielded for a longer conversation.

    Raises:
        InputError: If the template changes earlier turns when later ones follow, so that they cannot be told apart.
    """
    padding: Any = tokenizer.eos_token_id
    for (text,) in examples:
        ids, supervised = tokens_of(json.loads(text), tokenizer)
        if len(ids) > length:
            yield None
            continue
        row = np.full(length, -1 - padding, dtype=np.int32)
        row[: len(ids)] = np.where(supervised, ids, -1 - ids)
        yield row


def tokens_of(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a conversation, and which of them are an assistant's turn, the end of the turn included.

    Args:
        messages: The conversation.
        tokenizer: With a chat template.

    Returns:
        int32 ``[N]`` and bool ``[N]``.

    Raises:
        InputError: If the template changes earlier turns when later ones follow.
    """
    found: list[int] = []
    supervised: list[bool] = []
    for number, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            prompt = _encode(messages[:number], tokenizer, True) if number else []
            found, supervised = _extend_rows(found, supervised, prompt, False)
        whole = _encode(messages[: number + 1], tokenizer, False)
        found, supervised = _extend_rows(found, supervised, whole, message["role"] == ASSISTANT)
    return np.asarray(found, dtype=np.int32), np.asarray(supervised, dtype=bool)


def _encode(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, prompt: bool) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=prompt, return_dict=True
    )
    return list(encoded["input_ids"])


def _extend_rows(
    found: list[int], supervised: list[bool], longer: list[int], learned: bool
) -> tuple[list[int], list[bool]]:
    if longer[: len(found)] != found:
        raise InputError(
            "the chat template renders a turn differently when another one follows, so --messages cannot tell which "
            "tokens are the assistant's; use --field and --answer instead"
        )
    return longer, supervised + [learned] * (len(longer) - len(found))
