"""The facts about a machine from which ``capabilities`` decides which attention backends work."""

import importlib
import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

# Module that an attention backend imports, by distribution.
MODULES = {
    "flash-attn": "flash_attn",
    "flash-attn-3": "flash_attn_interface",
    "flash-attn-4": "flash_attn.cute",
    "kernels": "kernels",
    "triton": "triton",
}
# The kernels behind scaled_dot_product_attention, fastest first.
SDPA_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_CPU_KERNELS = ("flash", "math")


@dataclass(frozen=True)
class Machine:
    """Device, dtype and installed packages.

    Attributes:
        device: Device of the model.
        device_name: Human-readable name, for example ``"NVIDIA H200"``.
        capability: Compute capability of an NVIDIA GPU; ``None`` on any other device.
        dtype: Dtype of queries, keys and values.
        packages: Version by distribution, for those in :data:`MODULES` that are installed.
        import_errors: Error by distribution, for those that are installed but cannot be imported.
        sdpa_kernels: Why each kernel of :data:`SDPA_KERNELS` does not run; ``""`` if it does.
        kernels_versions: The versions of ``kernels`` that transformers accepts: at least, and below.
    """

    device: torch.device
    device_name: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    packages: Mapping[str, str]
    import_errors: Mapping[str, str]
    sdpa_kernels: Mapping[str, str]
    kernels_versions: tuple[str, str] = (KERNELS_MIN_VERSION, KERNELS_MAX_VERSION)

    @property
    def device_label(self) -> str:
        """Human-readable device, with its name if it is a GPU."""
        return f"{self.device} ({self.device_name})" if self.device.type == "cuda" else str(self.device)

    @property
    def dtype_name(self) -> str:
        """Human-readable dtype."""
        return str(self.dtype).removeprefix("torch.")


def find_device(device: torch.device | str) -> torch.device:
    """Return the device of that name.

    Raises:
        ValueError: If there is no such device.
        RuntimeError: If it is a GPU that PyTorch does not see.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device must be a torch device or the name of one ('cpu', 'cuda', 'cuda:1'), got {device!r}"
        ) from error
    count = torch.cuda.device_count() if found.type == "cuda" else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        seen, instead = (
            (f"{count} GPU{'s' * (count > 1)}", f"'cuda:{count - 1}' or 'cpu'") if count else ("no GPU", "'cpu'")
        )
        raise RuntimeError(
            f"device {found} does not exist: this PyTorch ({torch.__version__}) sees {seen}; use {instead}"
        )
    return found


def inspect_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Inspect the machine: import the installed packages, and try SDPA's kernels on a few random numbers.

    Args:
        device: Device of the model.
        dtype: Dtype of queries, keys and values.

    Returns:
        The facts about the machine.

    Raises:
        RuntimeError: If the device is a GPU that PyTorch does not see.
    """
    device = find_device(device)
    packages = {name: version for name in MODULES if (version := _version(name)) is not None}
    is_gpu = device.type == "cuda"
    errors = {name: error for name in packages if is_gpu and (error := _import_error(MODULES[name]))}
    is_nvidia = is_gpu and torch.version.hip is None
    return Machine(
        device=device,
        device_name=torch.cuda.get_device_name(device) if is_gpu else platform.processor() or device.type,
        capability=torch.cuda.get_device_capability(device) if is_nvidia else None,
        dtype=dtype,
        packages=packages,
        import_errors=errors,
        sdpa_kernels={name: _sdpa_obstacle(name, device, dtype) for name in SDPA_KERNELS},
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # an extension compiled for another torch raises errors of any type
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _sdpa_obstacle(name: str, device: torch.device, dtype: torch.dtype) -> str:
    if device.type == "cpu" and name not in _CPU_KERNELS:
        return "needs CUDA, but the device is the CPU"
    with warnings.catch_warnings(record=True) as said, torch.enable_grad(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("always")
        try:
            # Drawn on the CPU, so that the device's generator is left alone.
            query = torch.randn(1, 2, 64, 64).to(device, dtype).requires_grad_()
            with sdpa_kernel(SDPA_KERNELS[name]):
                scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
        except (RuntimeError, NotImplementedError, TypeError) as error:
            # torch warns with a reason for every kernel it skipped, including those switched off.
            reasons = [str(w.message).partition(" (Triggered")[0] for w in said]
            own = [reason for reason in reasons if "not used because" not in reason and "disabled" not in reason]
            return " ".join(own) or first_line(error)
    return ""


def first_line(error: BaseException) -> str:
    """The first line of an error message, which names the cause."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
