"""Which attention backends work on a machine, and the exact reason where one does not."""

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
        name: What transformers calls it; ``sdpa/...`` are the kernels behind ``sdpa``, which torch chooses among.
        available: Whether it runs here, forward and backward.
        reason: Why not, or what it runs on.
        fix: What to do about it, empty where it is available.
    """

    name: str
    available: bool
    reason: str
    fix: str = ""


class _Library(NamedTuple):
    """A flash attention library: its distribution, the GPUs it is written for, and how to get it."""

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
# The hub's builds of the same libraries, as transformers names them.
HUB_KERNELS = {FLASH_ATTN_KERNEL_FALLBACK[name]: name for name in _LIBRARIES}
# What "auto" tries, fastest first.
ORDER = (*_LIBRARIES, *HUB_KERNELS, "sdpa", "flex_attention", "eager")


def attention_backends(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16
) -> list[AttentionBackend]:
    """Every attention backend, fastest first: available here, or the exact reason why not.

    Args:
        device: Where a model would run; by default the accelerator, or the CPU where there is none.
        dtype: Of its queries, keys and values.

    Returns:
        Rows; the four kernels that torch has behind ``sdpa`` follow it, as ``sdpa/cudnn`` and so on.

    Raises:
        ValueError: If ``device`` is no device or ``dtype`` no floating dtype.
        RuntimeError: If ``device`` is a GPU that PyTorch does not see.

    Example:
        >>> rows = {row.name: row for row in attention_backends("cpu")}
        >>> rows["sdpa"].available
        True
        >>> rows["flash_attention_4"].reason
        'needs an NVIDIA GPU, and the device is cpu'
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating torch dtype such as torch.bfloat16, got {dtype!r}")
    return judge(inspect_machine(default_device() if device is None else find_device(device), dtype))


def default_device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")


def judge(machine: Machine) -> list[AttentionBackend]:
    """The rows of :func:`attention_backends` for a machine of which the facts are known."""
    rows = [judge_backend(name, machine) for name in ORDER]
    place = ORDER.index("sdpa") + 1
    rows[place:place] = [
        AttentionBackend(f"sdpa/{name}", not why, why or "runs") for name, why in machine.sdpa_kernels.items()
    ]
    return rows


def judge_backend(name: str, machine: Machine) -> AttentionBackend:
    """The row of one backend, a hub kernel of any name among them."""
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
        name: What was asked for.

    Raises:
        TypeError: If it is not a string.
        ValueError: If it names nothing; the error gives the nearest name.

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
    """Whether a backend is a flash attention library, from a package or from the hub."""
    return name in _LIBRARIES or "/" in name


def _gpu_obstacle(name: str, library: _Library | None, machine: Machine) -> AttentionBackend | None:
    """What no installation helps against: the device, its generation, the dtype."""
    if machine.device.type != "cuda" or (machine.capability is None and name != "flash_attention_2"):
        reason = f"needs an NVIDIA GPU, and the device is {machine.where}"
        fix = "put the model on a GPU (device_map='cuda', or model.to('cuda')), or take backend='sdpa'"
        return AttentionBackend(name, False, reason, fix)
    if library is not None and machine.capability is not None and machine.capability < library.capability:
        needed, found = (f"{major}.{minor}" for major, minor in (library.capability, machine.capability))
        reason = (
            f"needs compute capability {needed} ({library.generation}) or later, and {machine.device_name} has {found}"
        )
        return AttentionBackend(name, False, reason, "take backend='sdpa', whose kernels include older GPUs")
    if machine.dtype not in HALF:
        reason = f"computes in float16 and bfloat16 only, and the model is in {machine.dtype_name}"
        fix = "load the model with dtype=torch.bfloat16, or take backend='sdpa'"
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
        reason = f"{library.distribution} {found} is installed, and {library.oldest} or later is needed"
        return AttentionBackend(name, False, reason, library.install)
    if library.distribution in machine.import_errors:
        reason = f"{library.distribution} {found} does not import: {machine.import_errors[library.distribution]}"
        fix = f"install it again for torch {torch.__version__}: {library.install}"
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
        reason = f"kernels {found} is installed, and this transformers takes {oldest} or later, below {below}"
        return AttentionBackend(name, False, reason, fix)
    if "kernels" in machine.import_errors:
        reason = f"kernels {found} does not import: {machine.import_errors['kernels']}"
        return AttentionBackend(name, False, reason, fix)
    return AttentionBackend(name, True, f"kernels {found}; downloaded from the hub when it is first used")


def _sdpa(machine: Machine) -> AttentionBackend:
    running = [name for name in SDPA_KERNELS if not machine.sdpa_kernels[name]]
    if running:
        return AttentionBackend("sdpa", True, f"in torch {torch.__version__}; its kernels here: {', '.join(running)}")
    reason = f"none of its kernels runs on {machine.where} in {machine.dtype_name}"
    return AttentionBackend("sdpa", False, reason, "take backend='eager'")


def _flex_attention(machine: Machine) -> AttentionBackend:
    name = "flex_attention"
    if machine.device.type != "cuda":
        reason = f"torch has its backward pass on GPUs only, and the device is {machine.where}"
        return AttentionBackend(name, False, reason, "put the model on a GPU, or take backend='sdpa'")
    if "triton" not in machine.packages or "triton" in machine.import_errors:
        reason = machine.import_errors.get("triton", "the package triton, which compiles it, is not installed")
        return AttentionBackend(name, False, reason, "install a CUDA build of torch, which brings triton")
    return AttentionBackend(name, True, f"compiled by triton {machine.packages['triton']} for every new shape")
