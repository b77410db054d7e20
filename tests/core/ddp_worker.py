"""One rank of :mod:`test_distributed`: half of the batch through DDP, gradients compared with the whole batch."""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cggr_core import CGGRModel, Selection
from reference_routing import gradients, relative_error
from tiny_models import ROUTABLE, VOCAB


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    input_ids = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[0, :7] = -100
    mask = torch.rand(4, 12, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[:, -1] = False
    mask[0, :6] = False
    count = (labels[:, 1:] != -100).sum()

    def selection(rows: slice) -> Selection:
        return Selection.from_mask(mask[rows], weight=torch.full((4, 12), 2.5)[rows], capacity=8)

    mine = slice(0, 2) if rank == 0 else slice(2, 4)
    for settings in (
        {"gradient": "exact"},
        {"gradient": "kv", "engine": "interleaved", "selection": "random"},
        {"gradient": "kv", "engine": "two_pass"},
        {"gradient": "detached", "engine": "two_pass"},
    ):
        model = ROUTABLE["llama"]()
        CGGRModel(model, **settings)(input_ids, labels=labels, selection=selection(slice(0, 4))).backward()
        wanted = gradients(model)
        parallel = DistributedDataParallel(CGGRModel(model, **settings))
        # DDP takes the mean over ranks, so each divides by its share of the global count.
        loss = parallel(input_ids[mine], labels=labels[mine], selection=selection(mine), num_items=count / 2)
        loss.backward()
        error = relative_error(gradients(model), wanted)
        assert error <= 1e-5, (settings, error)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
