"""Nested state (optimizers, schedules) as two plain files: tensors in safetensors, the rest in JSON.

No pickle: loading a checkpoint runs no code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from cggr_train.errors import InputError


def save_state(folder: Path, name: str, state: Any) -> None:
    """Write ``<name>.safetensors`` and ``<name>.json`` into ``folder``.

    Args:
        folder: An existing folder.
        name: Stem of both files.
        state: Dictionaries, lists, tuples, tensors, strings, numbers, booleans and None, nested. Tuples come
            back as lists; keys may be strings or integers.

    Raises:
        TypeError: If ``state`` holds anything else.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    skeleton = _encode(state, tensors, name)
    (folder / f"{name}.json").write_text(json.dumps(skeleton, indent=1) + "\n", encoding="utf-8")
    save_file(tensors, folder / f"{name}.safetensors")


def load_state(folder: Path, name: str) -> Any:
    """Read what :func:`save_state` wrote; tensors are on the CPU.

    Raises:
        InputError: If a file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        skeleton = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / f"{name}.safetensors")
        return _decode(skeleton, tensors)
    except (OSError, SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise InputError(f"the checkpoint {folder} is incomplete or damaged: {name} ({error})") from error


def _encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        # clone, since safetensors refuses tensors that share memory
        tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": path}
    if isinstance(value, list | tuple):
        return [_encode(item, tensors, f"{path}.{number}") for number, item in enumerate(value)]
    if isinstance(value, dict):
        pairs = []
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise TypeError(f"state has a key of type {type(key).__name__} at {path}; use strings or integers")
            pairs.append([key, _encode(item, tensors, f"{path}.{key}")])
        return {"items": pairs}
    raise TypeError(f"state has a {type(value).__name__} at {path}; only tensors and plain values can be saved")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if isinstance(value, dict):
        if "tensor" in value:
            return tensors[value["tensor"]]
        return {key: _decode(item, tensors) for key, item in value["items"]}
    return value
