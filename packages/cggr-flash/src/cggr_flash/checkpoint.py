"""Checks of a checkpoint before it is loaded, so that errors name the file at fault."""

import difflib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

_PICKLED = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
_ADAPTER_CONFIG = "adapter_config.json"


def check_configuration(folder: Path) -> None:
    """Raise ``FileNotFoundError`` unless a folder holds a model's configuration."""
    if (folder / CONFIG_NAME).is_file():
        return
    if (folder / _ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} holds a PEFT adapter without its base model; load the base model, then call "
            "peft.PeftModel.from_pretrained(model, path)"
        )
    raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}{_nested(folder)}; it holds {_listing(folder)}")


def check_weights(folder: Path, *, variant: str | None, use_safetensors: bool | None) -> None:
    """Raise unless a folder holds complete weights that, if requested, are safe to read.

    Args:
        folder: Folder of the model.
        variant: As in ``from_pretrained``.
        use_safetensors: As in ``from_pretrained``.

    Raises:
        FileNotFoundError: If weights are missing, in whole or in part, or are pickles.
        ValueError: If a weight file is damaged.
    """
    for path in _weights(folder, variant, use_safetensors):
        check_whole(path)


def check_whole(path: Path) -> None:
    """Raise if a safetensors file is truncated or invalid; the tensors themselves are not read."""
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({path.stat().st_size} bytes; {error}); it may be an interrupted download or copy, or "
            "a git-lfs pointer; download it again"
        ) from error


def missing_path(name: str) -> str:
    """The error message for a missing path, with the closest existing name."""
    path = Path(name).expanduser()
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    neighbours = sorted(child.name for child in existing.iterdir()) if existing.is_dir() else []
    wanted = path.absolute().relative_to(existing).parts[:1]
    near = difflib.get_close_matches(wanted[0], neighbours, n=1) if wanted else []
    hint = f"; did you mean {existing / near[0]}?" if near else ""
    return f"{name!r} does not exist (but {existing} does){hint}"


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path: names on the hub are ``model`` or ``owner/model``."""
    return name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1


def _weights(folder: Path, variant: str | None, use_safetensors: bool | None) -> list[Path]:
    def with_variant(name: str) -> str:
        stem, dot, rest = name.partition(".")
        return name if variant is None else f"{stem}.{variant}{dot}{rest}"

    whole, index = folder / with_variant(SAFE_WEIGHTS_NAME), folder / with_variant(SAFE_WEIGHTS_INDEX_NAME)
    if use_safetensors is not False:
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _shards(index)
    pickled = [name for name in _PICKLED if (folder / with_variant(name)).is_file()]
    if pickled and use_safetensors:
        raise FileNotFoundError(
            f"{folder} has its weights only as {with_variant(pickled[0])}, a pickle, which can run code when loaded; "
            "convert it to safetensors (with save_pretrained), or pass use_safetensors=False if you trust it"
        )
    if not pickled:
        raise FileNotFoundError(
            f"{folder} has a {CONFIG_NAME} but no weights: neither {with_variant(SAFE_WEIGHTS_NAME)} nor "
            f"{with_variant(SAFE_WEIGHTS_INDEX_NAME)}{_nested(folder)}; it holds {_listing(folder)}"
        )
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({type(error).__name__}: {error}); download it again") from error
    shards = [index.parent / name for name in names]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} files listed in {index.name}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; download them"
        )
    return shards


def _listing(folder: Path) -> str:
    names = sorted(child.name for child in folder.iterdir())
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "nothing"


def _nested(folder: Path) -> str:
    """Hint at a model unpacked one level too deep, or at a trainer's checkpoints."""
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    return f" (but its folder {found[-1]!r} has one)" if found else ""
