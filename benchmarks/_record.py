"""Shared by all benchmarks: timing, a description of the machine, and writing and plotting of results."""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "triton", "transformers", "trl", "numpy", "cggr-core", "cggr-kernels", "cggr-moe")


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Describe the machine and the versions that a result belongs to.

    Args:
        device: Device that the benchmark runs on.

    Returns:
        JSON-ready mapping: date (UTC, ISO 8601), commit (the variable ``CGGR_COMMIT`` if set, for copies outside the
        repository; else HEAD, with ``+`` if tracked files differ from it), python, system, versions of the installed
        packages, device name, its memory in bytes, CPU cores and torch threads.
    """
    device = torch.device(device)
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "device": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory": properties.total_memory, "cuda": torch.version.cuda}
    return found


def _commit() -> str | None:
    if told := os.environ.get("CGGR_COMMIT"):
        return told
    try:
        arguments = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **arguments).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **arguments).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def summary(samples: Sequence[float]) -> dict[str, Any]:
    """Median and spread of repeated measurements.

    Args:
        samples: At least one number, all in the same unit.

    Returns:
        ``median``, ``spread`` (``[first quartile, third quartile]``) and ``samples`` (how many).

    Raises:
        ValueError: If ``samples`` is empty.
    """
    if not samples:
        raise ValueError("samples is empty; a benchmark needs at least one measurement")
    if len(samples) == 1:
        return {"median": samples[0], "spread": [samples[0], samples[0]], "samples": 1}
    quartiles = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": quartiles[1], "spread": [quartiles[0], quartiles[2]], "samples": len(samples)}


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    control: str,
    repeats: int = 10,
    warmup: int = 2,
    calls: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, dict[str, Any]]:
    """Time several candidates in one run, in turns, so that drift of the machine affects all of them equally.

    Args:
        candidates: Name → call to time; a call may return once its work is queued, since the device is synchronised
            here.
        control: The candidate that the others are compared with.
        repeats: Timed rounds.
        warmup: Rounds before those.
        calls: Consecutive calls of a candidate, as in a training loop; the device is synchronised before and after
            them.
        device: Device that the calls run on.

    Returns:
        For each name: :func:`summary` of its seconds per call, ``unit``, and ``ratio``: the :func:`summary` of the
        control's seconds over its seconds in the same round (above 1 is faster than the control).

    Raises:
        ValueError: If ``control`` is not one of the candidates.
    """
    if control not in candidates:
        raise ValueError(f"control is {control!r}, which is not one of the candidates {sorted(candidates)}")
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warmup + repeats):
        for name, call in candidates.items():
            _wait(device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            _wait(device)
            seconds[name].append((time.perf_counter() - start) / calls)
    return _rows({name: samples[warmup:] for name, samples in seconds.items()}, control)


def measure_until(
    candidates: Mapping[str, Callable[[], object]],
    *,
    control: str,
    deadline: float,
    rounds: int,
    least: int = 3,
    calls: int = 1,
    device: str | torch.device = "cpu",
    each: Callable[[dict[str, dict[str, Any]]], object] = lambda rows: None,
) -> dict[str, dict[str, Any]]:
    """:func:`measure` round by round, until there are enough rounds or time or, after a whole round, memory is up.

    Args:
        candidates: Name → call to time, each called before.
        control: The candidate that the others are compared with.
        deadline: Value of :func:`time.monotonic` after which no further round begins.
        rounds: Most timed rounds.
        least: Fewest timed rounds.
        calls: Consecutive calls of a candidate; see :func:`measure`.
        device: Device that the calls run on.
        each: Given what there is after every round, so that it can be kept if the run is cut off.

    Returns:
        As :func:`measure`.

    Raises:
        ValueError: If ``control`` is not one of the candidates.
        torch.OutOfMemoryError: If the first round does not fit in memory.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    while len(seconds[control]) < least or (len(seconds[control]) < rounds and time.monotonic() < deadline):
        try:
            found = measure(candidates, control=control, repeats=1, warmup=0, calls=calls, device=device)
        except torch.OutOfMemoryError as error:  # a candidate may hold more the longer it runs
            if not seconds[control]:
                raise
            print(f"stopped after {len(seconds[control])} whole rounds: {str(error).split('. ')[0]}", flush=True)
            break
        for name, row in found.items():
            seconds[name].append(row["median"])
        each(_rows(seconds, control))
    return _rows(seconds, control)


def add_seconds(parser: argparse.ArgumentParser) -> None:
    """Give a benchmark the option ``--seconds``: after that time, it starts nothing new and reports what it has."""
    parser.add_argument("--seconds", type=float, help="start nothing new after this time")


def deadline(seconds: float | None) -> float:
    """The value of :func:`time.monotonic` in ``seconds`` from now; infinite for ``None``."""
    return math.inf if seconds is None else time.monotonic() + seconds


def is_over(deadline: float) -> bool:
    """Whether a :func:`deadline` has passed."""
    return time.monotonic() >= deadline


def _rows(seconds: Mapping[str, Sequence[float]], control: str) -> dict[str, dict[str, Any]]:
    return {
        name: summary(samples)
        | {"unit": "s", "ratio": summary([c / s for c, s in zip(seconds[control], samples, strict=True)])}
        for name, samples in seconds.items()
    }


class PeakOf:
    """A call that records its peak CUDA memory, above what was allocated before it.

    Args:
        call: The call to run.

    Attributes:
        peak: Bytes, the largest since the last :meth:`forget`.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.peak = 0

    def __call__(self) -> None:
        """Run it."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.call()
        self.peak = max(self.peak, torch.cuda.max_memory_allocated() - before)

    def forget(self) -> None:
        """Reset the peak, after a first run that tuned kernels."""
        self.peak = 0


def _wait(device: str | torch.device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def write(
    name: str,
    rows: Mapping[str, Mapping[str, Any]],
    *,
    settings: Mapping[str, Any],
    control: str,
    device: str | torch.device = "cpu",
    made_in: Mapping[str, Any] | None = None,
    folder: Path = RESULTS,
) -> Path:
    """Write one result file atomically: an earlier file stays until the new one is complete.

    Args:
        name: Name of the benchmark and of the file, without ``.json``.
        rows: Variant → its numbers, each with unit, median and spread (see ``benchmarks/README.md``).
        settings: Shapes, dtype, seed, keep ratio: everything needed to repeat the run.
        control: The row that the others are compared with.
        device: Device that the benchmark ran on.
        made_in: The :func:`environment` of earlier runs; this process's if None.
        folder: Where to write.

    Returns:
        Path of the file.

    Raises:
        ValueError: If ``control`` is not one of the rows, or ``settings`` has no ``seed``.
    """
    if control not in rows:
        raise ValueError(f"control is {control!r}, which is not one of the rows {sorted(rows)}")
    if "seed" not in settings:
        raise ValueError(f"settings has no 'seed', only {sorted(settings)}; add the seed of the run")
    result = {
        "benchmark": name,
        "environment": environment(device) if made_in is None else dict(made_in),
        "settings": dict(settings),
        "control": control,
        "rows": {row: dict(values) for row, values in rows.items()},
    }
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
    return path


def load(name: str, *, folder: Path = RESULTS) -> dict[str, Any]:
    """Read the result file of a benchmark."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def plot(result: Mapping[str, Any], path: Path, *, field: str | None = None, label: str | None = None) -> None:
    """Plot the rows of a result with their spread, as bars, or losses as points; standard steps and TRL's own are grey.

    Args:
        result: What :func:`load` returns.
        path: PNG to write.
        field: Part of each row to draw (``"ratio"``); the row itself when None.
        label: Text of the axis; the rows' unit when None.
    """
    # Not pyplot: a benchmark needs neither a window nor global state.
    from matplotlib.figure import Figure

    rows = {name: row[field] if field else row for name, row in result["rows"].items()}
    control = result["control"].rpartition(": ")[2]  # "131072 tokens, 0.25 kept: SDPA" is one beside "...: SDPA"
    figure = Figure(figsize=(7.2, 0.9 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (name, row) in enumerate(rows.items()):
        low, high = row["spread"]
        error = [[max(row["median"] - low, 0.0)], [max(high - row["median"], 0.0)]]
        ordinary = name.rpartition(": ")[2] == control or name.startswith(("standard", "TRL"))
        colour = "0.6" if ordinary else "#2a6f97"
        if row.get("unit") == "nat":  # losses differ by hundredths, which bars from zero would not show
            axes.errorbar(row["median"], place, xerr=error, color=colour, fmt="o", capsize=3)
        else:
            axes.barh(place, row["median"], xerr=error, color=colour, height=0.6, capsize=3)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.08)
    unit = next(iter(rows.values())).get("unit", field or "")
    axes.set_xlabel(label or {"nat": "held-out loss, nats per token"}.get(unit, unit))
    axes.set_title(f"{result['benchmark']}: {result['environment']['device']}", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
