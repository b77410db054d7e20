"""Model sizes that ``cggr train --config`` builds from scratch: Llama-type configurations."""

from __future__ import annotations

import difflib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cggr_train.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

WEIGHTS = ("*.safetensors", "*.bin")
"""Files that hold the weights of a model directory with a ``config.json``."""


class Preset(NamedTuple):
    """Sizes of a Llama-type decoder; everything else is Llama's default."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int


PRESETS: dict[str, Preset] = {
    "nano": Preset(64, 176, 2, 2, 2),
    "micro": Preset(128, 352, 4, 4, 4),
    "tiny": Preset(256, 704, 6, 4, 4),
    "small": Preset(384, 1024, 8, 6, 6),
    "base": Preset(576, 1536, 30, 9, 3),
    "large": Preset(2048, 8192, 16, 32, 8),
}
"""``base`` has the shape of SmolLM-135M and ``large`` that of Llama-3.2-1B; the smaller ones are for CPUs."""


def build_config(name: str, *, vocab_size: int, length: int) -> PretrainedConfig:
    """Model configuration from a preset's name or from a ``config.json``.

    Args:
        name: A key of :data:`PRESETS`, or the path of a Hugging Face ``config.json``.
        vocab_size: Rows of the embedding; overrides a ``config.json``.
        length: Longest sequence in tokens; raises ``max_position_embeddings`` if it is smaller.

    Raises:
        InputError: If ``name`` is neither a preset nor a readable configuration.

    Example:
        >>> build_config("nano", vocab_size=512, length=64).num_hidden_layers
        2
    """
    from transformers import AutoConfig, LlamaConfig

    preset = PRESETS.get(name)
    if preset is not None:
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=preset.hidden_size,
            intermediate_size=preset.intermediate_size,
            num_hidden_layers=preset.num_layers,
            num_attention_heads=preset.num_heads,
            num_key_value_heads=preset.num_key_value_heads,
            max_position_embeddings=max(length, 2048),
            tie_word_embeddings=True,
        )
    if not Path(name).exists():
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"--config must be one of {', '.join(PRESETS)} or the path of a config.json, got {name!r}{hint}"
        )
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"--config {name}: not a model configuration ({_first_line(error)})") from error
    config.vocab_size = vocab_size
    if getattr(config, "max_position_embeddings", length) < length:
        config.max_position_embeddings = length
    return config


def build_model(config: PretrainedConfig, *, seed: int) -> PreTrainedModel:
    """A causal language model with random float32 weights, the same for the same ``seed``.

    Raises:
        InputError: If ``config`` is not one of a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError as error:
        raise InputError(f"{type(config).__name__} has no causal language model ({_first_line(error)})") from error


def check_model_folder(path: str) -> None:
    """Refuse a path that is not a model directory, without reading weights.

    Raises:
        InputError: If the directory is missing or has no configuration that can be read.
    """
    from transformers import AutoConfig

    if Path(path).is_file():
        raise InputError(f"--model {path} is a file; give the directory that holds it, {Path(path).parent}")
    if not Path(path).is_dir():
        raise InputError(
            f"the model directory {path} does not exist; to train from scratch, give --config instead; for a model on "
            "the Hugging Face hub, give its full name (OWNER/NAME)"
        )
    if gguf_argument(path):
        return  # its configuration is inside the weights file and takes seconds to read
    if not (Path(path) / "config.json").exists():
        if (Path(path) / "adapter_config.json").exists():
            raise InputError(
                f"the model directory {path} holds a PEFT adapter without its base model; merge the two "
                "(merge_and_unload), save the result with save_pretrained and give that directory"
            )
        raise InputError(
            f"the model directory {path} holds neither config.json nor a GGUF file; give a directory written by "
            "save_pretrained"
        )
    try:
        AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(f"the model directory {path} cannot be loaded: {_first_line(error)}") from error
    if not any(file for kind in WEIGHTS for file in Path(path).glob(kind)):
        raise InputError(
            f"the model directory {path} holds config.json but no weights ({' or '.join(WEIGHTS)}); give a directory "
            "written by save_pretrained"
        )


def gguf_argument(path: str) -> dict[str, str]:
    """Extra arguments of ``from_pretrained`` for a directory with a GGUF file; empty for any other directory.

    Raises:
        InputError: If the directory has several such files and no configuration, or the package gguf is missing.
    """
    if (Path(path) / "config.json").exists():
        return {}
    found = sorted(file.name for file in Path(path).glob("*.gguf"))
    if not found:
        return {}
    if len(found) > 1:
        raise InputError(f"the model directory {path} holds {len(found)} GGUF files; keep only one of them there")
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path} holds a GGUF file; reading it requires the package gguf: python -m pip install gguf")
    return {"gguf_file": found[0]}


def load_model(path: str) -> PreTrainedModel:
    """Load a causal language model in float32, from a directory written by ``save_pretrained`` or with one GGUF file.

    Raises:
        InputError: If the directory is missing, holds no such model, or lacks some of its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_model_folder(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
            **gguf_argument(path),
        )  # fmt: skip
    except Exception as error:  # several libraries raise unrelated types for a damaged directory
        raise InputError(
            f"the model directory {path} cannot be loaded: {_first_line(error)}; if a file of it is damaged, save or "
            "download the model again"
        ) from error
    model, report = loaded
    if gguf_argument(path):  # the weights are plain float32 now and can be trained and saved
        del model.config.quantization_config
        model.is_quantized = False
        if getattr(model, "hf_quantizer", None) is not None:  # saving the model would be refused with it
            del model.hf_quantizer
    # transformers would continue with random weights
    missing = sorted(report["missing_keys"])
    if missing:
        raise InputError(
            f"the model directory {path} lacks {len(missing):,} of the weights required by its configuration, the "
            f"first being {missing[0]}; save the whole causal language model there"
        )
    if report["mismatched_keys"]:
        name, found, wanted = sorted(report["mismatched_keys"])[0]
        raise InputError(
            f"the model directory {path} does not match its configuration: {name} has shape {list(found)}, but "
            f"config.json requires {list(wanted)}"
        )
    return model


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
