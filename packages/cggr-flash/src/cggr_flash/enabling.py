"""Switch a loaded model to the fastest attention backend that works on it, in place."""

import logging
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cggr_flash.capabilities import HALF, ORDER, backend_row, check_backend, default_device, is_flash
from cggr_flash.machine import Machine, first_line, inspect_machine
from cggr_flash.model_support import Implementations, current, is_switchable, model_obstacle, set_backend, unwrapped
from cggr_flash.trial import TrialError, describe_difference, trial

_logger = logging.getLogger("cggr_flash")

Model = TypeVar("Model", bound=nn.Module)
AUTO_GOES_ON = "use backend='auto', which tries the next one"


def enable_flash_attention(model: Model, backend: str = "auto") -> Model:
    """Switch a loaded model to an attention backend, in place, after a trial forward and backward.

    The results of the trial must agree with eager attention. Under ``torch.autocast``, autocast's dtype counts instead
    of the model's. Image towers that do not support the backend keep theirs, and the log says so.

    Args:
        model: A transformers model (text only, or vision and text), or a PEFT wrapper of one.
        backend: A name from :func:`cggr_flash.attention_backends`, a hub kernel ``"owner/name"``, or ``"auto"`` for the
            fastest that works with this model, dtype and device. The logger ``cggr_flash`` gets one line on which
            backends were skipped and why.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is not a transformers model, or ``backend`` is not a string.
        ValueError: If there is no such backend, or flash attention is requested for a model in float32.
        RuntimeError: If the backend does not work; the message says why and what to do. The model is left unchanged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=99, **sizes))
        >>> enable_flash_attention(model, "sdpa").config._attn_implementation
        'sdpa'
    """
    check_backend(backend)
    base = unwrapped(model)
    if backend == "auto" and not is_switchable(base):
        reason, _ = model_obstacle(base, "another") or ("its attention cannot be changed", "")
        raise RuntimeError(
            f"{reason}, and it cannot be changed in place; load it with load_model_with_flash_attention(path), which "
            "builds it with the fastest backend that works"
        )
    choose(base, backend)
    return model


class SkippedBackend(NamedTuple):
    """A skipped backend: why, what to do, and whether it was tried on the model."""

    name: str
    reason: str
    fix: str = ""
    tried: bool = False


def format_reasons(skipped: Sequence[SkippedBackend]) -> str:
    """All reasons on one line, each once."""
    names: dict[str, list[str]] = {}
    for each in skipped:
        names.setdefault(each.reason, []).append(each.name)
    return "; ".join(f"not {', '.join(group)}: {reason}" for reason, group in names.items())


def error_message(backend: str, model_name: str, reason: str, fix: str) -> str:
    """The error message for an explicit backend that does not work."""
    return f"backend={backend!r} cannot be used for {model_name}: {reason}. To fix this: {fix}"


def choose(model: PreTrainedModel, backend: str) -> None:
    """Switch a model to ``backend``, or for ``"auto"`` to the first that works; see :func:`enable_flash_attention`."""
    device, dtype = placement(model)
    if backend != "auto":
        check_dtype(backend, dtype)
    skipped: list[SkippedBackend] = []
    if try_backends(model, ORDER if backend == "auto" else (backend,), skipped):
        return
    name = type(model).__name__
    if backend == "auto":
        raise RuntimeError(f"no attention backend works on {name} on {device}: {format_reasons(skipped)}")
    failed = skipped[-1]
    text = error_message(backend, name, failed.reason, failed.fix)
    raise RuntimeError(f"{text}. The model still uses {current(model)!r}")


def try_backends(model: PreTrainedModel, names: Sequence[str], skipped: list[SkippedBackend]) -> bool:
    """Switch a model to the first of ``names`` that works, and log it; if none works, leave the model unchanged.

    A model that cannot be switched is tried with the backend it was built with. Backends that do not work are appended
    to ``skipped``, whose earlier entries are for the log.
    """
    device, dtype = placement(model)
    machine = inspect_machine(device, dtype)
    before = Implementations(model)
    expected: list[Tensor] | None = None
    try:
        for name in names:
            reason, fix = _known_obstacle(model, name, machine)
            if reason:
                skipped.append(SkippedBackend(name, reason, fix))
                continue
            if expected is None and is_switchable(model):
                expected = _results_on_eager(model, before)
            reason, kept = _try_backend(model, name, expected, dtype)
            if not reason:
                _log_choice(model, name, machine, skipped, kept)
                return True
            before.restore()
            skipped.append(SkippedBackend(name, reason, AUTO_GOES_ON, tried=True))
    except BaseException:
        before.restore()
        raise
    return False


def placement(model: PreTrainedModel) -> tuple[torch.device, torch.dtype]:
    """Device of the model and dtype of its attention, taking autocast into account.

    Raises:
        ValueError: If its weights are on the meta device.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if devices == {torch.device("meta")}:
        raise ValueError(f"{type(model).__name__} is on the meta device and has no weights; load them first")
    # Offloaded weights run on the accelerator.
    device = min(devices, key=lambda each: (each.type in ("meta", "cpu"), each.index or 0))
    if torch.is_autocast_enabled(device.type):
        return device, torch.get_autocast_dtype(device.type)
    return device, model.dtype


def check_dtype(backend: str, dtype: torch.dtype) -> None:
    """Raise if flash attention is requested for a dtype it does not support."""
    if is_flash(backend) and dtype not in HALF:
        raise ValueError(
            f"backend={backend!r} supports float16 and bfloat16 only, but the model's dtype is "
            f"{str(dtype).removeprefix('torch.')}; load the model with dtype=torch.bfloat16, call this under "
            "torch.autocast, or use backend='sdpa'"
        )


def _known_obstacle(model: PreTrainedModel, name: str, machine: Machine) -> tuple[str, str]:
    row = backend_row(name, machine)
    if not row.available:
        return row.reason, row.fix
    return model_obstacle(model, name) or ("", "")


def _results_on_eager(model: PreTrainedModel, before: Implementations) -> list[Tensor]:
    try:
        set_backend(model, "eager")
        return trial(model)
    except Exception as error:
        raise RuntimeError(
            f"{type(model).__name__} fails on trial inputs, so no attention backend can be tested on it: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    finally:
        before.restore()


def _try_backend(
    model: PreTrainedModel, name: str, expected: list[Tensor] | None, dtype: torch.dtype
) -> tuple[str, list[str]]:
    """Why a backend does not work on the model, ``""`` if it does and stays set; and which towers keep theirs."""
    kept: list[str] = []
    try:
        if expected is not None:
            kept = set_backend(model, name)
        if current(model) != name:
            return f"transformers set {current(model)!r} instead", kept
        found = trial(model)
    except TrialError as error:
        return str(error), kept
    except Exception as error:  # compilers and kernels raise errors of any type
        return f"{type(error).__name__}: {first_line(error)}", kept
    return (describe_difference(found, expected, dtype) if expected is not None else ""), kept


def _log_choice(
    model: PreTrainedModel, name: str, machine: Machine, skipped: Sequence[SkippedBackend], kept: list[str]
) -> None:
    notes = [repr(name), *([format_reasons(skipped)] if skipped else []), *kept]
    accelerator = default_device()
    if machine.device.type == "cpu" and accelerator.type != "cpu":
        notes.append(f"{accelerator} may have a faster one: move the model there and call enable_flash_attention")
    # Warn of what should have worked, not of what is not installed.
    level = logging.WARNING if any(each.tried for each in skipped) else logging.INFO
    text = f"{type(model).__name__} on {machine.device_label} in {machine.dtype_name} runs on {'; '.join(notes)}"
    _logger.log(level, text)
