"""Two processes on half the batch each make the gradients of one process on the whole."""

import subprocess
import sys

import pytest

from tests.support.launchers import environment


@pytest.mark.parametrize("worker", ["ddp_worker", "fsdp_worker", "logprobs_worker"])
def test_two_ranks_equal_one(tmp_path, worker):
    command = [sys.executable, "-m", f"tests.support.{worker}"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
