"""One rank of :mod:`test_distributed`: half of the batch through DDP, gradients compared with the whole batch."""

from contextlib import contextmanager, nullcontext
from datetime import timedelta
from unittest import mock

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cggr_core import CGGRModel, Selection
from cggr_core.experimental import LearnedRouter, RememberedScores
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB

TIMEOUT = timedelta(minutes=2)  # a rank that dies must not leave the other waiting


def main() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank = dist.get_rank()
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
    check_learned_router(rank, input_ids, labels)
    check_remembered_scores(rank, input_ids)


def check_learned_router(rank: int, input_ids: torch.Tensor, labels: torch.Tensor) -> None:
    """Two halves teach the router the same as the whole batch, so the next selections also equal those of one rank."""
    parts = [slice(0, 4), slice(0, 2) if rank == 0 else slice(2, 4)]
    settings = {"selection": "sampled", "min_tokens_ratio": 0.4, "seed": 3}
    found, count = [], (labels[:, 1:] != -100).sum()
    for ranks, rows in enumerate(parts, start=1):
        model = ROUTABLE["llama"]()
        wrapped = CGGRModel(model, LearnedRouter(1, width=8, learning_rate=1e-3), **settings)
        with nothing_shared() if ranks == 1 else nullcontext():
            for draw in range(4):
                more = {"labels": labels[rows], "draw": draw, "first_row": rows.start, "num_items": count}
                wrapped(input_ids[rows], **more).backward()
        total = gradients(model)
        if ranks == 2:
            for value in total.values():
                dist.all_reduce(value)
        found.append((total, wrapped.router))
    error = relative_error(found[1][0], found[0][0])
    assert error <= 1e-5, error
    for one, two in zip(found[0][1].parameters(), found[1][1].parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=0, atol=5e-4)  # sixteen steps of up to 1e-3; Adam enlarges rounding


def check_remembered_scores(rank: int, input_ids: torch.Tensor) -> None:
    """Ranks whose batches differ in rows and tokens remember the same as one rank that runs both."""
    parts = [(input_ids[:3, :7], torch.tensor([0, 4, 1])), (input_ids[2:], torch.tensor([2, 3]))]
    for gradient in ("kv", "sequence"):
        found = []
        for mine in (parts, parts[rank : rank + 1]):
            memory = RememberedScores.empty(examples=5, length=12)
            wrapped = CGGRModel(ROUTABLE["llama"](), memory, gradient=gradient, selection="sampled", seed=3)
            with nothing_shared() if len(mine) == 2 else nullcontext():
                for draw in range(3):
                    for rows, ids in mine:
                        wrapped(rows, labels=rows, example_ids=ids, draw=draw).backward()
                        memory.flush()
            found.append(memory)
        alone, shared = found
        assert ((alone.observed >= 0) == (shared.observed >= 0)).all()
        assert (shared.observed >= 0).any(1).sum() > 2, "rows of both ranks"
        torch.testing.assert_close(shared.scores, alone.scores, rtol=1e-3, atol=0)


@contextmanager
def nothing_shared():
    """Run as if this rank were alone."""
    with (
        mock.patch("cggr_core.collectives.world_size", return_value=1),
        mock.patch("cggr_core.experimental.remembered_scores.world_size", return_value=1),
    ):
        yield
