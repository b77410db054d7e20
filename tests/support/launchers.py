"""Commands started by multi-process launchers, in real processes on this machine."""

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node"),
    "accelerate": (
        "accelerate.commands.launch", "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--multi_gpu", "--num_processes",
    ),
}  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """Of a process that finds the tests and shares the machine's cores."""
    shared = {"OMP_NUM_THREADS": "1", "COLUMNS": "100", "PYTHONPATH": _with_root(), "PYTHONWARNINGS": "default"}
    return {**os.environ, **shared, **more}


def launched(launcher: str, ranks: int, *arguments: object) -> list[str]:
    """The command line of so many ranks of ``python`` with these arguments."""
    return [sys.executable, "-m", *LAUNCHERS[launcher], str(ranks), *map(str, arguments)]


def finish(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run to the end, which must succeed; ``more`` is added to the environment."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**more), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _with_root() -> str:
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
