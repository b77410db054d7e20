"""``cggr doctor``: installed versions, the machine, the kernel behind each operation, and what else to install."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cggr_train.display import format_bytes
from cggr_train.tested_versions import verdict

PROJECT = ("cggr", "cggr-core", "cggr-kernels", "cggr-flash", "cggr-moe", "cggr-train")
AROUND = ("torch", "triton", "transformers", "tokenizers", "accelerate", "peft", "trl", "lightning", "flash-attn")


class Advice(NamedTuple):
    """Something worth installing.

    Attributes:
        package: What to install.
        gain: What it adds.
    """

    package: str
    gain: str


def versions(packages: tuple[str, ...] = (*PROJECT, *AROUND)) -> dict[str, str]:
    """Installed versions, including Python's; packages that are not installed are left out.

    Example:
        >>> "torch" in versions()
        True
    """
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """Name of an accelerator, or how many cores the CPU has.

    Example:
        >>> device_name(torch.device("cpu")).startswith("CPU")
        True
    """
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    module = torch.get_device_module(device)
    return str(module.get_device_name(device)) if hasattr(module, "get_device_name") else str(device)


def devices() -> list[tuple[str, str, str]]:
    """Every device torch can use: its name in torch, its model name, and details."""
    rows = [("cpu", device_name(torch.device("cpu")), f"{torch.get_num_threads()} threads in torch")]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    for number in range(torch.accelerator.device_count() if accelerator is not None else 0):
        assert accelerator is not None
        device = torch.device(accelerator.type, number)
        facts = []
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            facts = [f"{format_bytes(properties.total_memory)} memory",
                     f"compute capability {properties.major}.{properties.minor}"]  # fmt: skip
        rows.append((str(device), device_name(device), ", ".join(facts)))
    return rows


def attention_backends() -> list[tuple[str, bool, str, str]] | None:
    """Name, whether it works, why, and the fix, as found by cggr-flash; None if that is not installed."""
    try:
        flash: Any = importlib.import_module("cggr_flash")
    except ModuleNotFoundError as error:
        if error.name != "cggr_flash":
            raise
        return None
    return [(row.name, row.available, row.reason, row.fix) for row in flash.attention_backends()]


def operations() -> list[tuple[str, str, str, str]]:
    """Rows of operation, device type, implementation, and the reason for it."""
    # importing these modules registers the reference of their operation
    from cggr_core import backends

    return [tuple(map(str, row)) for row in backends.report()]  # type: ignore[misc]


def together(rows: list[tuple[str, str, str, str]]) -> list[tuple[str, str, str, str]]:
    """One row for all operations with the same implementation and reason.

    Example:
        >>> together([("select", "cpu", "torch", "no kernel"), ("difficulty", "cpu", "torch", "no kernel")])
        [('select, difficulty', 'cpu', 'torch', 'no kernel')]
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    for operation, *served in rows:
        found.setdefault((served[0], served[1], served[2]), []).append(operation)
    return [(", ".join(names), *served) for served, names in found.items()]


def advice(installed: dict[str, str], accelerator: str | None) -> list[Advice]:
    """Packages worth installing on this machine.

    Args:
        installed: What :func:`versions` found.
        accelerator: Type of the machine's accelerator, None if it has none.

    Example:
        >>> [item.package for item in advice({"cggr-flash": "0.1"}, "cuda")]
        ['./packages/cggr-kernels']
    """
    found = []
    if "cggr-kernels" not in installed and accelerator in ("cuda", "xpu"):
        found.append(
            Advice("./packages/cggr-kernels", "Triton kernels for scoring, selection, the loss and routed attention")
        )
    if "cggr-flash" not in installed:
        found.append(
            Advice("./packages/cggr-flash", "models on the fastest attention backend, and the list of backends here")
        )
    return found


def show_report(console: Console) -> None:
    """Print everything."""
    installed = versions()
    judged = [(name, found, verdict(name, found)) for name, found in installed.items()]
    _print(console, "Versions", ("package", "version", ""), judged)
    untested = [f"{name} {found} is {said}" for name, found, said in judged if said not in ("", "tested")]
    if untested:
        console.print(
            f"Not tested: {'; '.join(untested)}. If a model cannot be routed exactly, its first step raises an error. "
            "For the tested versions, install with -c constraints.txt in the checkout.",
            highlight=False,
        )
    _print(console, "Devices", ("device", "name", ""), devices())
    found = attention_backends()
    if found is not None:
        rows = [(name, "yes" if works else "no", reason, fix) for name, works, reason, fix in found]
        _print(console, "Attention backends", ("backend", "works", "because", "to change that"), rows)
    _print(console, "Operations", ("operations", "device", "served by", "why"), together(operations()))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    items = advice(installed, accelerator.type if accelerator is not None else None)
    if items:
        _print(
            console,
            "Worth installing, in a checkout: python -m pip install …",
            ("package", "brings"),
            [tuple(item) for item in items],
        )
    else:
        console.print("Nothing else to install on this machine.", highlight=False)


def _print(console: Console, title: str, headings: tuple[str, ...], rows: list[Any]) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)
