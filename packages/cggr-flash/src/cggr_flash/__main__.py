"""``python -m cggr_flash``: a table of this machine's attention backends."""

import argparse

import torch
import transformers

from cggr_flash.capabilities import attention_backends, default_device
from cggr_flash.machine import find_device


def main(arguments: list[str] | None = None) -> None:
    """Print the rows of :func:`cggr_flash.attention_backends`, aligned.

    Args:
        arguments: Command-line arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(prog="python -m cggr_flash", description="Which attention backends work here.")
    parser.add_argument("--device", help="device of the model (default: the accelerator, else cpu)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    chosen = parser.parse_args(arguments)
    try:
        device = find_device(chosen.device) if chosen.device else default_device()
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{device}, {chosen.dtype}, {versions}\n")
    table = [("backend", "works", "reason", "fix")]
    for row in attention_backends(device, getattr(torch, chosen.dtype)):
        table.append((row.name, "yes" if row.available else "no", row.reason, row.fix))
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for row in table:
        cells = [cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    main()
