"""Tokenizers: loaded from a directory, or a byte-level BPE trained on the data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cggr_train.errors import InputError
from cggr_train.presets import gguf_argument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
SMALLEST_VOCABULARY = 257  # every byte and the end-of-text token


def train_tokenizer(
    documents: Iterable[str], *, vocab_size: int, max_characters: int | None = 20_000_000
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer, which can encode any text.

    Args:
        documents: Texts to learn the merges from.
        vocab_size: Vocabulary size, end-of-text token included; smaller if the text has fewer merges.
        max_characters: Stop reading after about this many characters; None reads everything.

    Returns:
        A fast tokenizer whose end-of-text (and padding) token is ``<|endoftext|>``.

    Raises:
        InputError: If ``vocab_size`` is below 257 or the documents hold no text.

    Example:
        >>> tokenizer = train_tokenizer(["to be or not to be"] * 4, vocab_size=270)
        >>> tokenizer.decode(tokenizer("not to be")["input_ids"])
        'not to be'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"--vocab-size must be at least {SMALLEST_VOCABULARY} (256 bytes and the end of text), got {vocab_size}"
        )
    texts = _take(documents, max_characters)
    first = next(texts, None)
    if first is None:
        skipped = int(getattr(documents, "skipped", 0))
        left_out = f"; {skipped:,} bad lines were left out" if skipped else ""
        raise InputError(f"the data files hold no text to train a tokenizer on{left_out}; give files with text")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_chain(first, texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=10**9,
    )


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory written by ``save_pretrained``.

    Raises:
        InputError: If the directory is missing or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise InputError(f"the tokenizer directory {folder} does not exist")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **gguf_argument(folder))
    except Exception as error:  # transformers raises several unrelated types for a directory without a tokenizer
        if not any((Path(folder) / file).exists() for file in TOKENIZERS) and not gguf_argument(folder):
            raise InputError(f"the directory {folder} holds no tokenizer (none of {', '.join(TOKENIZERS)})") from error
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"the directory {folder} holds no tokenizer that can be loaded ({reason})") from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, *, name: str) -> None:
    """Refuse a tokenizer with ids that the model has no embedding for.

    A model may have more rows than the tokenizer has tokens (padded vocabularies are common).

    Args:
        tokenizer: The tokenizer.
        vocab_size: Rows of the model's embedding.
        name: Name of the tokenizer in the error message.

    Raises:
        InputError: If the tokenizer's largest id is ``vocab_size`` or more.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        raise InputError(
            f"{name} does not match the model: its ids go up to {largest:,}, but the model's vocabulary has "
            f"{vocab_size:,} rows; use the tokenizer that the model was trained with"
        )


def _take(documents: Iterable[str], max_characters: int | None) -> Iterator[str]:
    seen = 0
    for text in documents:
        yield text
        seen += len(text)
        if max_characters is not None and seen >= max_characters:
            return


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest
