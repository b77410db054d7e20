"""Token ids on disk: written once, mapped into memory by every later run."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from cggr_train.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLITS: tuple[str, ...] = ("train", "heldout")


class TokenStore(NamedTuple):
    """Token ids of both splits, one stream each, documents closed by the end-of-text token."""

    train: np.ndarray
    """Shape ``[N]``, uint16 or uint32, mapped from disk; int32 if only some tokens are supervised."""
    heldout: np.ndarray
    """Shape ``[M]``, same dtype."""
    documents: int
    """Documents in both splits."""
    skipped: int
    """Lines of the data files that could not be used and were left out."""

    @classmethod
    def open(cls, folder: Path) -> TokenStore:
        """Map the arrays that :func:`build_token_store` wrote into ``folder``.

        Raises:
            InputError: If the folder holds no token store, or one whose files were cut short.
        """
        try:
            meta = json.loads((folder / "tokens.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"{folder} holds no token store ({error})") from error
        arrays = {}
        for split in SPLITS:
            path, count, dtype = folder / f"{split}.bin", meta[split], np.dtype(meta["dtype"])
            size = path.stat().st_size if path.is_file() else 0
            if size != count * dtype.itemsize:
                raise InputError(f"{path} has {size} bytes, but {count * dtype.itemsize} were written; delete the run")
            arrays[split] = np.memmap(path, dtype=dtype, mode="r", shape=(count,))
        return cls(arrays["train"], arrays["heldout"], meta["documents"], meta["skipped"])


def build_token_store(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    length: int,
    heldout_fraction: float = 0.02,
    heldout_documents: Iterable[str] | None = None,
) -> TokenStore:
    """Tokenize documents into ``folder`` and map the result.

    Without ``heldout_documents`` a document is held out when a hash of its text falls below
    ``heldout_fraction``, so that equal documents are always on the same side. If that leaves less than one sequence on
    a side (few, long documents), the last ``heldout_fraction`` of the stream is held out instead.

    Args:
        documents: Texts; an attribute ``skipped`` is recorded if present.
        tokenizer: Must have an end-of-text token (``eos_token_id``).
        folder: Created if missing; ``tokens.json`` is written last, so a killed run leaves no partial store.
        length: Tokens of one training sequence; each split must hold at least one.
        heldout_fraction: Share of documents held out, in (0, 0.5].
        heldout_documents: Texts to hold out instead.

    Raises:
        InputError: If the documents are empty or too short, or the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token (eos_token), which separates documents")
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    folder.mkdir(parents=True, exist_ok=True)
    threshold = 0.0 if heldout_documents is not None else heldout_fraction
    counts = dict.fromkeys(SPLITS, 0)
    count_documents = 0
    paths = {split: folder / f"{split}.bin" for split in SPLITS}
    with paths["train"].open("wb") as train, paths["heldout"].open("wb") as heldout:
        files = {"train": train, "heldout": heldout}
        sides = ((text, "heldout" if in_heldout(text, threshold) else "train") for text in documents)
        if heldout_documents is not None:
            sides = itertools.chain(sides, ((text, "heldout") for text in heldout_documents))
        for split, ids in _encode(sides, tokenizer):
            _write(files[split], ids, dtype)
            counts[split] += len(ids)
            count_documents += 1
    skipped = int(getattr(documents, "skipped", 0)) + int(getattr(heldout_documents, "skipped", 0))
    left_out = f"; {skipped:,} bad lines were left out" if skipped else ""
    if count_documents == 0:
        raise InputError(f"the data files contain no text{left_out}")
    total = sum(counts.values())
    if heldout_documents is None and total < 2 * length:
        raise InputError(
            f"the text has {total:,} tokens, fewer than two sequences of {length:,} (--length), one to train "
            f"on and one to hold out{left_out}"
        )
    if heldout_documents is None and min(counts.values()) < length:
        counts = _split_by_position(paths, counts, dtype, length=length, fraction=heldout_fraction)
    for split, count in counts.items():
        if count < length:
            raise InputError(
                f"the {split} text has {count:,} tokens, fewer than one sequence of {length:,} (--length){left_out}"
            )
    return write_meta(folder, dtype, counts, documents=count_documents, skipped=skipped)


def write_meta(
    folder: Path, dtype: np.dtype[Any], counts: dict[str, int], *, documents: int, skipped: int
) -> TokenStore:
    """Finish a store: write its description and map its files."""
    meta = {"dtype": dtype.name, **counts, "documents": documents, "skipped": skipped}
    (folder / "tokens.json").write_text(json.dumps(meta, indent=2) + "\n")
    return TokenStore.open(folder)


def in_heldout(text: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out share: equal texts are on the same side."""
    digest = hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def _encode(sides: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    iterator = iter(sides)
    end: Any = tokenizer.eos_token_id
    while chunk := tuple(itertools.islice(iterator, 256)):
        texts = [text for text, _ in chunk]
        encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for (_, split), ids in zip(chunk, encoded["input_ids"], strict=True):
            yield split, [*ids, end]


def _write(file: BinaryIO, ids: list[int], dtype: np.dtype) -> None:
    file.write(np.asarray(ids, dtype=dtype).tobytes())


def _split_by_position(
    paths: dict[str, Path], counts: dict[str, int], dtype: np.dtype, *, length: int, fraction: float
) -> dict[str, int]:
    stream = np.concatenate([np.fromfile(paths[split], dtype=dtype) for split in SPLITS])
    held = min(max(round(fraction * len(stream)), length), len(stream))
    stream[: len(stream) - held].tofile(paths["train"])
    stream[len(stream) - held :].tofile(paths["heldout"])
    return {"train": len(stream) - held, "heldout": held}
