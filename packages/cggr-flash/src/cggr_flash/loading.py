"""Load a Hugging Face model with the fastest attention backend that works on it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file

from cggr_flash.capabilities import HALF, ORDER, backend_row, check_backend, default_device, is_flash
from cggr_flash.checkpoint import check_configuration, check_weights, looks_like_path, missing_path
from cggr_flash.enabling import (
    AUTO_GOES_ON,
    SkippedBackend,
    check_dtype,
    choose,
    error_message,
    format_reasons,
    try_backends,
)
from cggr_flash.machine import Machine, first_line, inspect_machine
from cggr_flash.model_support import class_obstacle

# Arguments of from_pretrained that locate the files, for the configuration and the weights alike.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_OURS = {
    "attn_implementation": "say backend=... instead",
    "torch_dtype": "say dtype=... instead",
    "output_loading_info": "only the model is returned, and weights that do not match raise an error",
}


def load_model_with_flash_attention(
    name_or_path: str | os.PathLike[str],
    backend: str = "auto",
    *,
    dtype: str | torch.dtype = "auto",
    device_map: Any = None,
    **from_pretrained: Any,
) -> PreTrainedModel:
    """Load a model from the hub or a folder with an attention backend that has been tried on it.

    The model class is the one named in the checkpoint, so causal and masked language models and vision-language models
    come back as they were saved. Everything that can be checked without the weights is checked before they are read.

    Args:
        name_or_path: Name on the hub, or a folder.
        backend: See :func:`cggr_flash.enable_flash_attention`.
        dtype: ``"auto"`` for the checkpoint's dtype, or ``torch.bfloat16``, ``"bfloat16"``, ...
        device_map: As in transformers, for example ``"cuda"``. ``None`` leaves the model on the CPU, where no flash
            attention runs.
        **from_pretrained: Further arguments of ``from_pretrained`` and settings of the configuration.
            ``trust_remote_code`` defaults to False and ``use_safetensors`` to True.

    Returns:
        The Hugging Face model, in evaluation mode.

    Raises:
        TypeError: If an argument is given twice under two names.
        ValueError: If there is no such backend, flash attention is requested in float32, or a weight file is damaged or
            incomplete.
        FileNotFoundError: If the path, the configuration or the weights do not exist.
        RuntimeError: If the backend does not work; the message says why and what to do.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes)).save_pretrained(folder)
        ...     model = load_model_with_flash_attention(folder, dtype="bfloat16")
        >>> model.config._attn_implementation, model.dtype
        ('sdpa', torch.bfloat16)
    """
    check_backend(backend)
    for name in _OURS.keys() & from_pretrained.keys():
        raise TypeError(f"load_model_with_flash_attention does not take {name!r}: {_OURS[name]}")
    dtype = _dtype(dtype)
    if isinstance(dtype, torch.dtype):
        check_dtype(backend, dtype)
    options = {"use_safetensors": True, "trust_remote_code": False, **from_pretrained}
    name = _checked_name(name_or_path, options)
    config, options = _config(name, options)
    _check_files(name, config, options)
    model_class = _model_class(config, options["trust_remote_code"])
    machine = inspect_machine(_planned_device(device_map), _planned_dtype(backend, dtype, config))
    candidates, skipped = _candidates(backend, model_class, config, machine)
    arguments = {**options, "config": config, "dtype": dtype, "device_map": device_map}
    if not _builds_attention_in(model_class):
        model = _load(model_class, name, arguments)
        choose(model, backend)
        return model
    # Such a model is rebuilt for each backend tried.
    for candidate in candidates:
        try:
            model = _load(model_class, name, {**arguments, "attn_implementation": candidate})
        except ImportError as error:
            skipped.append(SkippedBackend(candidate, f"ImportError: {first_line(error)}", AUTO_GOES_ON, tried=True))
        else:
            if try_backends(model, (candidate,), skipped):
                return model
        arguments["force_download"] = False
    if backend == "auto":
        raise RuntimeError(f"no attention backend works on {model_class.__name__}: {format_reasons(skipped)}")
    raise RuntimeError(error_message(backend, model_class.__name__, skipped[-1].reason, skipped[-1].fix))


def _candidates(
    backend: str, model_class: Any, config: Any, machine: Machine
) -> tuple[list[str], list[SkippedBackend]]:
    """The backends to try, and those ruled out by the machine or the model class.

    Raises:
        RuntimeError: If ``backend`` is ruled out.
    """
    candidates, skipped = [], []
    for name in ORDER if backend == "auto" else (backend,):
        row = backend_row(name, machine)
        obstacle = (row.reason, row.fix) if not row.available else class_obstacle(model_class, config, name)
        if obstacle is None:
            candidates.append(name)
        elif backend != "auto":
            raise RuntimeError(error_message(backend, model_class.__name__, *obstacle))
        else:
            skipped.append(SkippedBackend(name, obstacle[0]))
    return candidates, skipped


def _checked_name(name_or_path: str | os.PathLike[str], options: dict[str, Any]) -> str:
    """The name, if it could be on the hub or is a folder with a configuration."""
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(f"name_or_path must be a string or a path, got {type(name_or_path).__name__}")
    name = os.fspath(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if "config" not in options:
            check_configuration(folder / options.get("subfolder", ""))
        return str(folder)
    if folder.exists():
        raise FileNotFoundError(f"{name!r} is a file; pass the folder that contains it")
    if isinstance(name_or_path, os.PathLike) or looks_like_path(name):
        raise FileNotFoundError(missing_path(name))
    return name


def _config(name: str, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The configuration, and the remaining arguments for the model."""
    given = options.pop("config", None)
    if given is not None:
        if not isinstance(given, PreTrainedConfig):
            raise TypeError(f"config must be a transformers configuration, got {type(given).__name__}")
        return given, options
    # Arguments for both; transformers would overwrite the quantisation settings of the checkpoint with the last.
    shared = {key: options.pop(key) for key in (*_WHERE, "trust_remote_code", "quantization_config") if key in options}
    where = {key: value for key, value in shared.items() if key != "quantization_config"}
    try:
        found: Any = AutoConfig.from_pretrained(name, return_unused_kwargs=True, **where, **options)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise FileNotFoundError(
            f"{missing_path(name)}, and the hub has no model of that name: {first_line(error)}"
        ) from error
    config, rest = found
    return config, {**rest, **shared}


def _check_files(name: str, config: Any, options: Mapping[str, Any]) -> None:
    """Check the weights of a folder, if they are in the usual place."""
    folder = Path(name) / options.get("subfolder", "")
    elsewhere = options.get("gguf_file") or getattr(config, "transformers_weights", None)
    # Folders of torch.distributed.checkpoint have a file of that name.
    if folder.is_dir() and not elsewhere and not (folder / ".metadata").is_file():
        check_weights(folder, variant=options.get("variant"), use_safetensors=options["use_safetensors"])


def _model_class(config: Any, trust_remote_code: bool) -> Any:
    """The class that the checkpoint names, or the one that its own code defines."""
    if trust_remote_code and getattr(config, "auto_map", None):
        kinds = [kind for kind in config.auto_map if kind.startswith("AutoModel")]
        return getattr(transformers, kinds[0], AutoModelForCausalLM) if kinds else AutoModelForCausalLM
    for architecture in config.architectures or ():
        found = getattr(transformers, architecture, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return AutoModelForCausalLM


def _builds_attention_in(model_class: Any) -> bool:
    # An AutoModel stands for a class known only after loading.
    return issubclass(model_class, PreTrainedModel) and not model_class._can_set_attn_implementation()


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) and dtype != "auto" else dtype
    if found == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise ValueError(f"dtype must be 'auto', a floating torch dtype or the name of one ('bfloat16'), got {dtype!r}")


def _planned_dtype(backend: str, dtype: str | torch.dtype, config: Any) -> torch.dtype:
    """The dtype the model will have; if only the weights can tell, one that rules nothing out."""
    planned = dtype if isinstance(dtype, torch.dtype) else getattr(config, "dtype", None)
    if not isinstance(planned, torch.dtype):
        return HALF[0] if is_flash(backend) or backend == "auto" else torch.float32
    check_dtype(backend, planned)
    return planned


def _planned_device(device_map: Any) -> torch.device:
    """Where ``device_map`` puts the layers: the accelerator, even if parts are offloaded."""
    if device_map is None:
        return torch.get_default_device()
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return default_device()
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    devices = [torch.device(place) for place in places if place not in ("disk", "cpu")]
    return devices[0] if devices else torch.device("cpu")


def _load(model_class: Any, name: str, arguments: dict[str, Any]) -> PreTrainedModel:
    """The model, with every parameter loaded from the checkpoint."""
    try:
        model, report = model_class.from_pretrained(name, **arguments, output_loading_info=True)
    except SafetensorError as error:
        # A folder was checked before; the hub's cache is checked now.
        where = {key: arguments[key] for key in _WHERE if key in arguments and key != "force_download"}
        path = cached_file(name, CONFIG_NAME, **{**where, "local_files_only": True})
        if path is not None:
            asked = {"variant": arguments.get("variant"), "use_safetensors": arguments["use_safetensors"]}
            check_weights(Path(path).parent, **asked)
        raise ValueError(f"the weights of {name!r} are damaged: {first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"the weights of {name!r} lack {len(missing)} of the tensors of {type(model).__name__} ({shown}), which "
            "transformers would initialise at random. If you want that, load the model with transformers and pass it "
            "to enable_flash_attention"
        )
    return model
