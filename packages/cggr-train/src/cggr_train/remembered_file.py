"""Remembered scores on disk: one safetensors file, written atomically and memory-mapped on opening."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cggr_train.errors import InputError, SaveError

if TYPE_CHECKING:
    from cggr_core.experimental import RememberedScores

FILE_NAME = "remembered_scores.safetensors"
"""Of the file in a checkpoint's folder."""


def fingerprint(sequences: np.ndarray) -> str:
    """A digest of the scored examples: other text, or text split differently, has another one.

    Args:
        sequences: Token ids ``[E, L]``; the id of an example is its row.

    Example:
        >>> fingerprint(np.zeros((2, 4), dtype=np.uint16))[:8]
        'a0c39781'
    """
    digest = hashlib.sha256(f"{sequences.shape} {sequences.dtype}".encode())
    for start in range(0, len(sequences), 4096):
        digest.update(np.ascontiguousarray(sequences[start : start + 4096]).data)
    return digest.hexdigest()


def save_remembered(path: Path, memory: RememberedScores, *, examples: str) -> None:
    """Write the scores to ``path`` atomically: under another name first, then renamed.

    Args:
        path: The file; an existing one is replaced, or unchanged if anything fails.
        memory: The scores; pending transfers from a device are waited for.
        examples: Which examples they belong to, see :func:`fingerprint`.

    Raises:
        SaveError: If the file cannot be written (a full disk, say).
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
    metadata = {"examples": examples, "forwards": str(memory.forwards), "format": "pt"}
    try:
        save_file({"score": memory.scores, "observed": memory.observed}, temporary, metadata=metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        there = "the earlier file is unchanged" if path.exists() else "there is no earlier file"
        raise SaveError(f"the remembered scores {path} could not be saved: {error}; {there}") from error


def load_remembered(path: Path, *, examples: str) -> RememberedScores:
    """Open what :func:`save_remembered` wrote.

    The file is mapped copy-on-write: a score takes memory once it is read or changed, and the file does not change
    until the scores are saved again.

    Args:
        path: The file.
        examples: Which examples the scores must belong to.

    Raises:
        InputError: If the file is missing, damaged, or belongs to other examples.
    """
    from safetensors import SafetensorError, safe_open

    from cggr_core.experimental import RememberedScores

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            score, observed = file.get_tensor("score"), file.get_tensor("observed")
        forwards = int(metadata["forwards"])
        memory = RememberedScores(score, observed, forwards=forwards)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} holds no remembered scores ({error})") from error
    if metadata.get("examples") != examples:
        raise InputError(
            f"{path} holds the scores of other examples (or of the same text split differently); train on the data it "
            "was made from, or start with an empty memory"
        )
    return memory
