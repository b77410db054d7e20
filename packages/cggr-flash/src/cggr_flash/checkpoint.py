"""Looking at a checkpoint before a model is made of it, so that what is wrong with it is said by its name."""

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
    """Raise ``FileNotFoundError`` unless a folder holds the configuration of a model."""
    if (folder / CONFIG_NAME).is_file():
        return
    if (folder / _ADAPTER_CONFIG).is_file():
        raise FileNotFoundError(
            f"{folder} holds a PEFT adapter without its base model; load the base model, then "
            "peft.PeftModel.from_pretrained(model, path)"
        )
    raise FileNotFoundError(f"{folder} has no {CONFIG_NAME}{_nested(folder)}; it holds {_listing(folder)}")


def check_weights(folder: Path, *, variant: str | None, use_safetensors: bool | None) -> None:
    """Raise unless a folder holds weights that are whole and, if so asked, safe to read.

    Args:
        folder: With the files of a model.
        variant: Of ``from_pretrained``.
        use_safetensors: Likewise.

    Raises:
        FileNotFoundError: If the weights or a part of them is missing, or they are pickles.
        ValueError: If a file of the weights is damaged.
    """
    for path in _weights(folder, variant, use_safetensors):
        check_whole(path)


def check_whole(path: Path) -> None:
    """Raise if a safetensors file is cut off or not one; the tensors themselves are not read."""
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged ({path.stat().st_size} bytes; {error}); it may be an interrupted download or copy, or "
            "a git-lfs pointer: fetch it again"
        ) from error


def missing_path(name: str) -> str:
    """The error about a path that is not there, with the nearest of its neighbours."""
    path = Path(name).expanduser()
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    neighbours = sorted(child.name for child in existing.iterdir()) if existing.is_dir() else []
    wanted = path.absolute().relative_to(existing).parts[:1]
    near = difflib.get_close_matches(wanted[0], neighbours, n=1) if wanted else []
    hint = f"; did you mean {existing / near[0]}?" if near else ""
    return f"{name!r} does not exist; {existing} does{hint}"


def looks_like_path(name: str) -> bool:
    """Whether a name can only be a path: one on the hub is ``model`` or ``owner/model``."""
    return name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1


def _weights(folder: Path, variant: str | None, use_safetensors: bool | None) -> list[Path]:
    def varied(name: str) -> str:
        stem, dot, rest = name.partition(".")
        return name if variant is None else f"{stem}.{variant}{dot}{rest}"

    whole, index = folder / varied(SAFE_WEIGHTS_NAME), folder / varied(SAFE_WEIGHTS_INDEX_NAME)
    if use_safetensors is not False:
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _shards(index)
    pickled = [name for name in _PICKLED if (folder / varied(name)).is_file()]
    if pickled and use_safetensors:
        raise FileNotFoundError(
            f"{folder} holds its weights as {varied(pickled[0])} only, a pickle, which runs code when it is loaded; "
            "convert it to safetensors (save_pretrained does), or pass use_safetensors=False if you trust it"
        )
    if not pickled:
        raise FileNotFoundError(
            f"{folder} has a {CONFIG_NAME} and no weights: neither {varied(SAFE_WEIGHTS_NAME)} nor "
            f"{varied(SAFE_WEIGHTS_INDEX_NAME)}{_nested(folder)}; it holds {_listing(folder)}"
        )
    return []


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({type(error).__name__}: {error}); fetch it again") from error
    shards = [index.parent / name for name in names]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent} lacks {len(missing)} of the {len(shards)} files that {index.name} names: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; fetch them"
        )
    return shards


def _listing(folder: Path) -> str:
    names = sorted(child.name for child in folder.iterdir())
    return (", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")) or "nothing"


def _nested(folder: Path) -> str:
    """Where a model was unpacked one level too deep, or a trainer left its checkpoints."""
    found = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_NAME}"))
    return f" (but its folder {found[-1]!r} has one)" if found else ""
