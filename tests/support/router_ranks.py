"""One rank of :mod:`test_routers_native`: scores remembered by two GPUs whose batches differ in size."""

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist

from cggr_core import CGGRModel
from cggr_core.experimental import RememberedScores
from tests.support.gpu_models import tokens, varied
from tests.support.host_reads import no_host_reads

FORWARDS = 4


def remembered(parts: list[tuple[torch.Tensor, torch.Tensor]], *, watched: bool) -> RememberedScores:
    """What a few forwards of each part (token ids, example ids) leave; the last ones are ``watched`` for host reads."""
    memory = RememberedScores.empty(examples=5, length=300)
    wrapped = CGGRModel(varied(), memory, selection="sampled", seed=3)
    for draw in range(FORWARDS):
        for input_ids, example_ids in parts:
            with no_host_reads() if watched and draw == FORWARDS - 1 else nullcontext():
                wrapped(input_ids, labels=input_ids, example_ids=example_ids, draw=draw).backward()
            memory.flush()
    return memory


def main() -> None:
    """Compare what this rank remembers with the other, and what it does when it runs both ranks' batches alone."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    parts = [(tokens()[:, :100], torch.tensor([0, 4, 1])), (tokens()[1:], torch.tensor([2, 3]))]
    alone = remembered(parts, watched=False)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    shared = remembered(parts[rank : rank + 1], watched=True)
    agreeing = ((alone.observed >= 0) == (shared.observed >= 0)).float().mean()
    print(f"rank {rank}: {agreeing:.4f} of the tokens are known to both, {(shared.observed >= 0).sum()} in all")
    assert agreeing >= 0.99  # a token at the edge of being drawn may differ by the order of a sum
    known = (alone.observed >= 0) & (shared.observed >= 0)
    assert known.any(1).all(), "examples of both ranks"
    torch.testing.assert_close(shared.scores[known], alone.scores[known], rtol=1e-2, atol=1e-3)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
