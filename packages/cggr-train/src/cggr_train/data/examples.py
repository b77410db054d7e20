"""Examples of a prompt and an answer, one per row, with only the answer supervised."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cggr_train.data.documents import Documents
from cggr_train.data.token_store import TokenStore, in_heldout, write_meta
from cggr_train.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 256
Rows = Callable[[list[tuple[str, ...]], "PreTrainedTokenizerBase", int], Iterator["np.ndarray | None"]]


def build_example_store(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    length: int,
    heldout_fraction: float = 0.02,
    heldout_documents: Documents | None = None,
    rows: Rows | None = None,
) -> TokenStore:
    """Tokenize examples into ``folder``, one per row of ``length`` tokens, and map the result.

    A row is the prompt's tokens and a newline, the answer's tokens, the end-of-text token, and then padding, which does
    not affect a causal model. Everything except the answer and its end is unsupervised, see
    :mod:`cggr_train.data.supervision`. Longer examples are left out and counted in ``skipped``.

    Args:
        documents: The examples; the last field is the answer, the others are the prompt.
        tokenizer: Must have an end-of-text token.
        folder: Made if missing.
        length: Tokens of a row.
        heldout_fraction: Share of examples held out, by a hash of their text.
        heldout_documents: Examples to hold out instead.
        rows: Builds the rows of a chunk of examples, None for one that is too long; by default as above.

    Raises:
        InputError: If a side is left without an example, or the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token (eos_token), which ends every answer")
    folder.mkdir(parents=True, exist_ok=True)
    counts, longer = {"train": 0, "heldout": 0}, {"train": 0, "heldout": 0}
    with (folder / "train.bin").open("wb") as train, (folder / "heldout.bin").open("wb") as heldout:
        files = {"train": train, "heldout": heldout}
        for side, parts in _split_chunks(documents, heldout_documents, heldout_fraction):
            for row in (rows or _rows)(parts, tokenizer, length):
                if row is None:
                    longer[side] += 1
                    continue
                files[side].write(row.tobytes())
                counts[side] += 1
    skipped = documents.skipped + (0 if heldout_documents is None else heldout_documents.skipped) + sum(longer.values())
    for side, count in counts.items():
        if count == 0:
            few = "no example fell to it; give more data, a larger --heldout-fraction or --heldout FILE"
            long = f"{longer[side]:,} exceed --length {length:,}; increase it or give more data"
            raise InputError(
                f"no example is left in the {side} data: {long if longer[side] or side == 'train' else few}"
            )
    tokens = {side: count * length for side, count in counts.items()}
    return write_meta(folder, np.dtype(np.int32), tokens, documents=sum(counts.values()), skipped=skipped)


def _split_chunks(
    documents: Documents, heldout: Documents | None, fraction: float
) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """Chunks of examples, each with its split."""
    if heldout is not None:
        for side, source in (("train", documents), ("heldout", heldout)):
            yield from ((side, list(chunk)) for chunk in _chunks(source.records()))
        return
    for chunk in _chunks(documents.records()):
        for side in ("train", "heldout"):
            kept = [parts for parts in chunk if in_heldout("\n".join(parts), fraction) == (side == "heldout")]
            if kept:
                yield side, kept


def _chunks(records: Iterable[tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], ...]]:
    iterator = iter(records)
    while chunk := tuple(itertools.islice(iterator, CHUNK)):
        yield chunk


def _rows(
    examples: list[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[np.ndarray | None]:
    end: Any = tokenizer.eos_token_id
    prompts = _encode(["\n".join(parts[:-1]) + "\n" for parts in examples], tokenizer)
    answers = _encode([parts[-1] for parts in examples], tokenizer)
    for prompt, answer in zip(prompts, answers, strict=True):
        used = len(prompt) + len(answer) + 1
        if used > length:
            yield None
            continue
        row = np.full(length, -1 - end, dtype=np.int32)
        row[: len(prompt)] = -1 - np.asarray(prompt, dtype=np.int32)
        row[len(prompt) : used] = [*answer, end]
        yield row


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]
