"""``python -m cggr_kernels``: what runs where, and why."""

from __future__ import annotations

import torch

from cggr_kernels.backend import BACKEND, OPS, REASON


def rows() -> list[tuple[str, str, str, str]]:
    """One row for each op and device type.

    Returns:
        Tuples of four strings: op, device type, what runs there, and why.

    Example:
        >>> rows()[0][0]
        'difficulty'
    """
    present = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    table = []
    for op in OPS:
        for device_type, is_present in present.items():
            if (op, device_type) in BACKEND:
                how = "kernel compiled by Triton" if device_type == "cuda" else "TRITON_INTERPRET=1 is set"
                table.append((op, device_type, "triton", how if is_present else f"{how}; no such device here"))
            elif device_type == "cuda" and REASON:
                table.append((op, device_type, "torch reference", REASON))
            else:
                table.append((op, device_type, "torch reference", "the kernels are written for CUDA"))
    return table


def main() -> None:
    """Print the table of :func:`rows`, aligned."""
    table = [("op", "device", "runs", "because"), *rows()]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for row in table:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]))


if __name__ == "__main__":
    main()
