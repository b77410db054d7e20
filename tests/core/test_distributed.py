"""Two processes on half the batch each make the gradients of one process on the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("worker", ["ddp_worker.py", "fsdp_worker.py"])
def test_two_ranks_equal_one(tmp_path, worker):
    folder = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONWARNINGS": "default"}
    command = [sys.executable, str(folder / worker)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
