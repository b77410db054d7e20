"""Memory in use and its peak, of the accelerator if training runs on one, else of this process."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

_ALLOCATOR_FAILURES = ("can't allocate memory", "not enough memory", "out of memory")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_in_use(device: torch.device) -> int:
    """Bytes held now: the allocator's on an accelerator, the resident set of this process on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    return _from_status("VmRSS") or _max_resident()


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes held so far, or since :func:`reset_peak_memory`.

    On a CPU this is the peak resident set. Linux hands a child process its parent's peak through
    ``getrusage``, so it is read from ``/proc/self/status``, which starts at zero with the new program.
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    return _from_status("VmHWM") or _max_resident()


def reset_peak_memory(device: torch.device) -> None:
    """Reset :func:`peak_memory` to what is in use; on CPUs this only works under Linux.

    On a CPU, memory that was freed but is still held by the C library is returned to the system first; its reuse would
    not show in the resident set.
    """
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has malloc_trim
        if trim is not None:
            trim(0)
        _CLEAR.write_text("5", encoding="ascii")  # sets VmHWM to VmRSS, see proc(5)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means out of memory, on an accelerator or on the host (torch has no class for the latter).

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes differ"))
        (True, False)
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATOR_FAILURES)


def free_memory(device: torch.device) -> None:
    """Release memory that nothing refers to, for example after an error ended a step."""
    gc.collect()
    if device.type != "cpu":
        torch.accelerator.empty_cache()


def _from_status(key: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def _max_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows lacks the module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
