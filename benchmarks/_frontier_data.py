"""The rows that `benchmarks.frontier` trains on, tokenized once and stored in one small file."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks._frontier_arms import Setting
from benchmarks.gsm8k import among_others, read_problems
from cggr_train.data.supervision import unsupervised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = ("train", "test")
TUNING = 96
"""Training rows reserved for choosing learning rates; no run trains on them."""


class Rows(NamedTuple):
    """int64 ``[N, S]`` each, unsupervised tokens as :mod:`cggr_train.data.supervision` writes them."""

    train: Tensor
    tuning: Tensor
    test: Tensor


def prepare(path: Path, setting: Setting, gsm8k: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write the file of a setting, unless it exists.

    Training problems whose answers take more tokens than the setting has slots are left out: 2.8% of GSM8K's.

    Args:
        path: Of the file.
        setting: The setting.
        gsm8k: Folder of the problems.
        tokenizer: Of the model.
    """
    if path.exists():
        return path
    sides = {side: read_problems(gsm8k / f"{side}.jsonl") for side in SIDES}
    others = sides["train"]
    end: int = tokenizer.eos_token_id  # pyright: ignore[reportAssignmentType]
    head: dict[str, Any] = {"length": setting.length}
    blobs: list[bytes] = []
    for seed, (side, problems) in enumerate(sides.items()):
        if side == "train":
            problems = problems[: setting.problems]
        if setting.context:  # of test problems too: those before one are training problems
            problems = among_others(problems, others, tokenizer, length=setting.length, seed=seed)
        prompts, answers = (
            tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            for texts in ([p["question"] + "\n" for p in problems], [p["answer"] for p in problems])
        )
        most = setting.slots if side == "train" else setting.length
        whole = [
            (prompt, [*answer, end])
            for prompt, answer in zip(prompts, answers, strict=True)
            if len(answer) < most and len(prompt) + len(answer) < setting.length
        ]
        largest = max(max(max(prompt), max(answer)) for prompt, answer in whole)
        ids = np.full((len(whole), setting.length), end, dtype="<u2" if max(largest, end) < 2**16 else "<u4")
        for row, (prompt, answer) in zip(ids, whole, strict=True):
            row[: len(prompt) + len(answer)] = [*prompt, *answer]
        places = np.array([[len(prompt), len(prompt) + len(answer)] for prompt, answer in whole], dtype="<u2")
        head[side] = {"rows": len(whole), "left_out": len(problems) - len(whole), "dtype": ids.dtype.str}
        blobs += [ids.tobytes(), places.tobytes()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(lzma.compress(json.dumps(head).encode() + b"\n" + b"".join(blobs), preset=6))
    return temporary.rename(path)


def load(path: Path, *, limit: int | None = None) -> tuple[Rows, dict[str, int | float]]:
    """The rows of a file, and their description for a result.

    Args:
        path: Of the file.
        limit: Most training rows.
    """
    line, _, data = lzma.decompress(path.read_bytes()).partition(b"\n")
    head, offset, found = json.loads(line), 0, {}
    for side in SIDES:
        count, length = head[side]["rows"], head["length"]
        ids = np.frombuffer(data, head[side].get("dtype", "<u2"), count * length, offset).reshape(count, length)
        offset += ids.nbytes
        places = np.frombuffer(data, "<u2", count * 2, offset).reshape(count, 2)
        offset += places.nbytes
        rows, place = torch.from_numpy(ids.astype(np.int64)), torch.arange(length)
        first, last = torch.from_numpy(places.astype(np.int64))[:, :, None].unbind(1)
        found[side] = torch.where((place >= first) & (place < last), rows, unsupervised(rows))
    train = found["train"]
    own = train[:-TUNING][:limit]
    noted: dict[str, int | float] = {
        "rows": len(own),
        "left_out": head["train"]["left_out"],
        "supervised": float((train >= 0).double().mean()),
        "most_supervised": int((train >= 0).sum(1).max()),
    }
    return Rows(own, train[-TUNING:], found["test"]), noted
