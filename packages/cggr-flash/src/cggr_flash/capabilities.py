"""Which attention backends work on a machine, and exactly why the others do not."""

import difflib
import re
from typing import NamedTuple

import torch
from torch.torch_version import TorchVersion
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

from cggr_flash.machine import SDPA_KERNELS, Machine, find_device, inspect_machine

HALF = (torch.float16, torch.bfloat16)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:\w+)?")


class AttentionBackend(NamedTuple):
    """One attention backend of transformers on this machine.

    Attributes:
        name: Name in transformers; ``sdpa/...`` are the kernels from which torch chooses for ``sdpa``.
        available: Whether it runs here, forward and backward.
        reason: Why it is not available, or what it runs on.
        fix: How to make it available; empty if it is.
    """

    name: str
    available: bool
    reason: str
    fix: str = ""


class _Library(NamedTuple):
    """A flash attention library: its distribution, the GPUs it supports, and how to install it."""

    distribution: str
    capability: tuple[int, int]
    generation: str
    oldest: str
    install: str


_LIBRARIES = {
    "flash_attention_4": _Library(
        "flash-attn-4", (9, 0), "Hopper", "4.0.0b18", "python -m pip install 'flash-attn-4>=4.0.0b18'"
    ),
    "flash_attention_3": _Library(
        "flash-attn-3",
        (9, 0),
        "Hopper",
        "3.0.0b1",
        "build it from the folder 'hopper' of the flash-attention repository (it is on no package registry)",
    ),
    "flash_attention_2": _Library(
        "flash-attn",
        (8, 0),
        "Ampere",
        "2.3.3",
        "python -m pip install --no-build-isolation 'flash-attn>=2.8' (it compiles CUDA code)",
    ),
}
# Hub builds of the same libraries, by their names in transformers.
HUB_KERNELS = {FLASH_ATTN_KERNEL_FALLBACK[name]: name for name in _LIBRARIES}
# The order in which "auto" tries backends, fastest first.
ORDER = (*_LIBRARIES, *HUB_KERNELS, "sdpa", "flex_attention", "eager")


def attention_backends(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16
) -> list[AttentionBackend]:
    """List every attention backend, fastest first, with the exact reason if it does not work here.

    Args:
        device: Device of the model; by default the accelerator, or the CPU if there is none.
        dtype: Dtype of queries, keys and values.

    Returns:
        One row per backend. The four kernels behind ``sdpa`` follow it, as ``sdpa/cudnn`` and so on.

    Raises:
        ValueError: If ``device`` is not a device or ``dtype`` is not a floating dtype.
        RuntimeError: If ``device`` is a GPU that PyTorch does not see.

    Example:
        >>> rows = {row.name: row for row in attention_backends("cpu")}
        >>> rows["sdpa"].available
        True
        >>> rows["flash_attention_4"].reason
        'needs an NVIDIA GPU, but the device is cpu'
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating torch dtype such as torch.bfloat16, got {dtype!r}")
    return backend_rows(inspect_machine(default_device() if device is None else find_device(device), dtype))


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def backend_rows(machine: Machine) -> list[AttentionBackend]:
    """The rows of :func:`attention_backends` for a given machine."""
    rows = [backend_row(name, machine) for name in ORDER]
    place = ORDER.index("sdpa") + 1
    rows[place:place] = [
        AttentionBackend(f"sdpa/{name}", not why, why or "runs") for name, why in machine.sdpa_kernels.items()
    ]
    return rows


def backend_row(name: str, machine: Machine) -> AttentionBackend:
    """The row of one backend, or of any hub kernel."""
    if name in _LIBRARIES:
        return _library(name, _LIBRARIES[name], machine)
    if name == "sdpa":
        return _sdpa(machine)
    if name == "flex_attention":
        return _flex_attention(machine)
    if name == "eager":
        return AttentionBackend(name, True, "the model's own code in plain torch")
    return _hub_kernel(name, machine)


def check_backend(name: str) -> str:
    """Return ``name`` if it is ``"auto"``, a backend, or has the form of a hub kernel's name.

    Args:
        name: The requested backend.

    Raises:
        TypeError: If it is not a string.
        ValueError: If there is no such backend; the message suggests the nearest name.

    Example:
        >>> check_backend("sdpa")
        'sdpa'
    """
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {name!r} of type {type(name).__name__}")
    names = ("auto", *ORDER)
    if name in names or _HUB_NAME.fullmatch(name):
        return name
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(repr(choice) for choice in names)
    raise ValueError(f"backend must be one of {listed}, or a hub kernel 'owner/name', got {name!r}{hint}")


def is_flash(name: str) -> bool:
    """Whether a backend is a flash attention library, installed or from the hub."""
    return name in _LIBRARIES or "/" in name


def _gpu_obstacle(name: str, library: _Library | None, machine: Machine) -> AttentionBackend | None:
    """Obstacles that no installation removes: the device, its generation, the dtype."""
    if machine.device.type != "cuda" or (machine.capability is None and name != "flash_attention_2"):
        reason = f"needs an NVIDIA GPU, but the device is {machine.device_label}"
        fix = "put the model on a GPU (device_map='cuda' or model.to('cuda')), or use backend='sdpa'"
        return AttentionBackend(name, False, reason, fix)
    if library is not None and machine.capability is not None and machine.capability < library.capability:
        needed, found = (f"{major}.{minor}" for major, minor in (library.capability, machine.capability))
        reason = (
            f"needs compute capability {needed} ({library.generation}) or later, but {machine.device_name} has {found}"
        )
        return AttentionBackend(name, False, reason, "use backend='sdpa', whose kernels support older GPUs")
    if machine.dtype not in HALF:
        reason = f"supports float16 and bfloat16 only, but the model is in {machine.dtype_name}"
        fix = "load the model with dtype=torch.bfloat16, or use backend='sdpa'"
        return AttentionBackend(name, False, reason, fix)
    return None


def _library(name: str, library: _Library, machine: Machine) -> AttentionBackend:
    obstacle = _gpu_obstacle(name, library, machine)
    if obstacle is not None:
        return obstacle
    found = machine.packages.get(library.distribution)
    if found is None:
        return AttentionBackend(name, False, f"the package {library.distribution} is not installed", library.install)
    if TorchVersion(found) < library.oldest:
        reason = f"{library.distribution} {library.oldest} or later is required, but {found} is installed"
        return AttentionBackend(name, False, reason, library.install)
    if library.distribution in machine.import_errors:
        reason = f"{library.distribution} {found} cannot be imported: {machine.import_errors[library.distribution]}"
        fix = f"reinstall it for torch {torch.__version__}: {library.install}"
        return AttentionBackend(name, False, reason, fix)
    return AttentionBackend(name, True, f"{library.distribution} {found} on {machine.device_name}")


def _hub_kernel(name: str, machine: Machine) -> AttentionBackend:
    library = _LIBRARIES[HUB_KERNELS[name]] if name in HUB_KERNELS else None
    obstacle = _gpu_obstacle(name, library, machine)
    if obstacle is not None:
        return obstacle
    fix = "python -m pip install 'transformers[kernels]'"
    found, (oldest, below) = machine.packages.get("kernels"), machine.kernels_versions
    if found is None:
        return AttentionBackend(name, False, "the package kernels is not installed", fix)
    if not TorchVersion(oldest) <= found or not TorchVersion(below) > found:
        reason = f"this transformers requires kernels >= {oldest}, < {below}, but {found} is installed"
        return AttentionBackend(name, False, reason, fix)
    if "kernels" in machine.import_errors:
        reason = f"kernels {found} cannot be imported: {machine.import_errors['kernels']}"
        return AttentionBackend(name, False, reason, fix)
    return AttentionBackend(name, True, f"kernels {found}; downloaded from the hub on first use")


def _sdpa(machine: Machine) -> AttentionBackend:
    running = [name for name in SDPA_KERNELS if not machine.sdpa_kernels[name]]
    if running:
        return AttentionBackend("sdpa", True, f"part of torch {torch.__version__}; kernels here: {', '.join(running)}")
    reason = f"none of its kernels run on {machine.device_label} in {machine.dtype_name}"
    return AttentionBackend("sdpa", False, reason, "use backend='eager'")


def _flex_attention(machine: Machine) -> AttentionBackend:
    name = "flex_attention"
    if machine.device.type != "cuda":
        reason = f"its backward pass needs a GPU, but the device is {machine.device_label}"
        return AttentionBackend(name, False, reason, "put the model on a GPU, or use backend='sdpa'")
    if "triton" not in machine.packages or "triton" in machine.import_errors:
        reason = machine.import_errors.get("triton", "it is compiled by triton, which is not installed")
        return AttentionBackend(name, False, reason, "install a CUDA build of torch, which includes triton")
    return AttentionBackend(name, True, f"compiled by triton {machine.packages['triton']} for every new shape")
