"""Memory in use and its peak, of the accelerator if training runs on one, else of this process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def memory_in_use(device: torch.device) -> int:
    """Bytes held now: the allocator's on an accelerator, the resident set of this process on a CPU."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    return _from_status("VmRSS") or _max_resident()


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes held so far.

    On a CPU this is the peak resident set. Linux hands a child process its parent's peak through
    ``getrusage``, so it is read from ``/proc/self/status``, which starts at zero with the new program.
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    return _from_status("VmHWM") or _max_resident()


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
    except ImportError:  # Windows has none
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
