"""Atomic checkpoints.

A checkpoint is written under a temporary name, flushed to the disk and then renamed to ``step-00000120``; unfinished
ones are ignored and removed by the next save. Older ones are deleted only after that.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from cggr_train.errors import DivergedError, InputError, SaveError
from cggr_train.loop import Progress
from cggr_train.ranks import ALONE, Ranks
from cggr_train.state_file import load_state, save_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = "unfinished-"


class TrainingState(NamedTuple):
    """What a checkpoint holds besides the model."""

    progress: Progress
    optimizer: dict[str, Any]
    learner: dict[str, Any]
    random: dict[str, Any]


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    state: TrainingState,
    *,
    keep: int = 2,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write one checkpoint and remove the oldest.

    The result can be passed to ``from_pretrained`` directly.

    Args:
        folder: Folder of the checkpoints; created if missing.
        model: Saved with ``save_pretrained`` (safetensors, no wrapper keys).
        tokenizer: Saved with the model.
        state: Optimizer, learner and random state go into ``training_state.safetensors`` and ``.json``.
        keep: Newest checkpoints to keep, at least 1.
        also: Writes further files into the given folder.

    Returns:
        The checkpoint's folder.

    Raises:
        DivergedError: If a weight is not finite: no run could resume from it.
        SaveError: If anything cannot be written (a full disk, say); earlier checkpoints are unchanged.
    """
    from safetensors import SafetensorError

    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise DivergedError(f"{name} is no longer finite after step {state.progress.step:,}; lower --learning-rate")
    final = checkpoint_path(folder, state.progress.step)
    temporary = folder / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        temporary.mkdir()
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        progress = vars(state.progress)
        save_state(temporary, "training_state", {**state._asdict(), "progress": progress})
        if also is not None:
            also(temporary)
        for path in temporary.iterdir():
            _flush(path)
        if final.exists():
            final.rename(folder / f"{_TEMPORARY}replaced-{final.name}-{os.getpid()}")
        temporary.rename(final)
        _remove_unfinished(folder)
        _flush(folder)
    except (OSError, SafetensorError, SaveError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(
            f"the checkpoint {final} could not be saved: {error}; {last_checkpoint_message(folder)}"
        ) from error
    for old in list_checkpoints(folder)[: -max(keep, 1)]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_training_state(checkpoint: Path) -> TrainingState:
    """The state that :func:`save_checkpoint` wrote, tensors on the CPU.

    Raises:
        InputError: If the checkpoint is incomplete or damaged.
    """
    state = load_state(checkpoint, "training_state")
    try:
        return TrainingState(**{**state, "progress": Progress(**state["progress"])})
    except (TypeError, KeyError) as error:
        raise InputError(f"the checkpoint {checkpoint} was written by another version ({error})") from error


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, None if there is none."""
    checkpoints = list_checkpoints(folder)
    return checkpoints[-1] if checkpoints else None


def last_checkpoint_message(folder: Path) -> str:
    """A clause for error messages: which checkpoint remains after a failed save."""
    last = latest_checkpoint(folder)
    return f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"


def random_state(device: torch.device, ranks: Ranks = ALONE) -> dict[str, Any]:
    """States of torch's generators (for dropout and the like), or a list of them if there are several ranks."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    gathered = {name: ranks.gather(state) for name, state in states.items()}
    return {name: found if ranks.size > 1 else found[0] for name, found in gathered.items()}


def restore_random_state(state: dict[str, Any], device: torch.device, ranks: Ranks = ALONE) -> None:
    """Restore what :func:`random_state` returned; with a different number of ranks, generators are unchanged."""
    states = {name: found if isinstance(found, list) else [found] for name, found in state.items()}
    if len(states["cpu"]) != ranks.size:
        return
    torch.set_rng_state(states["cpu"][ranks.rank])
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(states["device"][ranks.rank], device)


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def _flush(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
