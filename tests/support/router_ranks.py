"""One rank of :mod:`test_routers_native`: scores remembered by two GPUs whose batches differ in size."""

import os

import torch
import torch.distributed as dist

from cggr_core import CGGRModel
from cggr_core.experimental import RememberedScores
from tests.support.gpu_models import tokens, varied

FORWARDS = 4


def remembered(parts: list[tuple[torch.Tensor, torch.Tensor]], *, sync: str) -> RememberedScores:
    """What is remembered of a few forwards of each part (token ids, example ids), the last under ``sync``'s watch."""
    memory = RememberedScores.empty(examples=5, length=300)
    wrapped = CGGRModel(varied(), memory, selection="sampled", seed=3)
    for draw in range(FORWARDS):
        for input_ids, example_ids in parts:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(sync if draw == FORWARDS - 1 else "default")
            wrapped(input_ids, labels=input_ids, example_ids=example_ids, draw=draw).backward()
            torch.cuda.set_sync_debug_mode("default")
            memory.flush()
    return memory


def main() -> None:
    """Compare what this rank remembers with the other, and what it does when it runs both ranks' batches alone."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    parts = [(tokens()[:, :100], torch.tensor([0, 4, 1])), (tokens()[1:], torch.tensor([2, 3]))]
    alone = remembered(parts, sync="default")
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    shared = remembered(parts[rank : rank + 1], sync="error")
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
