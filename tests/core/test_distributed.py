"""Two processes on half the batch each compute the gradients of one process on the whole batch."""

import pytest

from tests.support import ddp_worker, fsdp_worker, logprobs_worker
from tests.support.two_ranks import run_on_two_ranks


@pytest.mark.parametrize("worker", [ddp_worker, fsdp_worker, logprobs_worker], ids=lambda worker: worker.__name__)
def test_two_ranks_equal_one(worker, tmp_path):
    run_on_two_ranks(worker.main, folder=tmp_path)
