"""Two ranks for a test, as ``torchrun`` starts them, but forked."""

import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path

from torch.distributed import TCPStore

from tests.support.forks import FORKS


def run_on_two_ranks(work: Callable[..., None], *arguments: object, folder: Path) -> list[str]:
    """Call ``work(*arguments)`` in two processes of one process group; what each of them printed.

    Raises:
        AssertionError: If one of them failed, with what both printed; the other is ended.
    """
    # The ranks are guests of a store that has found a port already.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    outputs = [folder / f"rank-{rank}.txt" for rank in range(2)]
    ranks = [
        FORKS.Process(target=_rank, args=(rank, store.port, output, work, arguments))
        for rank, output in enumerate(outputs)
    ]
    for rank in ranks:
        rank.start()
    running = list(ranks)
    while running:
        ended = wait([rank.sentinel for rank in running])
        running = [rank for rank in running if rank.sentinel not in ended]
        if any(rank.exitcode for rank in ranks):
            for rank in running:
                rank.kill()
    for rank in ranks:
        rank.join()
    printed = [output.read_text() for output in outputs]
    assert [rank.exitcode for rank in ranks] == [0, 0], "\n".join(printed)
    return printed


def _rank(number: int, port: int, output: Path, work: Callable[..., None], arguments: tuple[object, ...]) -> None:
    import torch

    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    torch.set_num_threads(1)
    with output.open("w", buffering=1) as file:
        sys.stdout = sys.stderr = file
        try:
            work(*arguments)
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
                torch.distributed.destroy_process_group()
        except BaseException:
            traceback.print_exc()
            sys.exit(1)
