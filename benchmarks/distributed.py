"""Tokens per second on one and on more devices: DDP and FSDP2, the standard step and CGGR's, with the optimizer.

``FSDP2, prefetched`` asks FSDP2 to gather the next layer's weights before a layer runs, and updates all shards in one
kernel: what there is to do about a host that is slower than its device.

``torchrun --nproc-per-node 1 -m benchmarks.distributed 1b``, then with 2: NCCL on GPUs, gloo for the shape ``cpu``.
Every rank has the shape's whole batch (weak scaling), and the loss is divided by the tokens of all ranks. A file for
each number of ranks, drawn by ``benchmarks.distributed_figures``; ``tokens_per_second`` counts all ranks' tokens. The
two steps of an engine are timed in turns, by the slowest rank.
"""

import argparse
import gc
import itertools
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks import _record
from benchmarks._random_model import SEED
from benchmarks._steps import SHAPES, Shape
from cggr_core import CGGRModel

RATIO = 0.25
CONTROL = "standard, DDP"
PREFETCHED = "FSDP2, prefetched"
ENGINES = ("DDP", "FSDP2", PREFETCHED)
# Settings of the routed steps: two passes with full-depth scores, and interleaved with tokens known beforehand.
ROUTED: dict[str, dict[str, str]] = {"CGGR": {}, "CGGR random": {"selection": "random"}}


def on_this_rank(shape: Shape) -> Shape:
    """The shape on this rank's device."""
    device = "cpu" if shape.device == "cpu" else f"{shape.device}:{os.environ['LOCAL_RANK']}"
    return Shape(**{**vars(shape), "device": device})


def parallel(shape: Shape, engine: str) -> tuple[nn.Module, nn.Module]:
    """A model whose gradients are averaged: wrapped in DDP, or sharded by FSDP2."""
    model = shape.model()
    if engine == "DDP":
        return model, DistributedDataParallel(model)
    mesh = init_device_mesh(torch.device(shape.device).type, (dist.get_world_size(),))
    layers = list(model.model.layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if engine == PREFETCHED:
        for layer, after in itertools.pairwise(layers):
            layer.set_modules_to_forward_prefetch([after])
    return model, model


def make_step(shape: Shape, engine: str, method: str, tokens: Tensor) -> Callable[[], None]:
    """A training step on this rank."""
    model, called = parallel(shape, engine)
    routed = CGGRModel(model, min_tokens_ratio=RATIO, seed=SEED, **ROUTED.get(method, {}))
    fused = engine == PREFETCHED and torch.device(shape.device).type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused or None)
    world = dist.get_world_size()
    # An int, since mixed precision casts floating inputs of a model.
    num_items = tokens.shape[0] * (tokens.shape[1] - 1) * world
    done = 0

    def step() -> None:
        nonlocal done
        if method == "standard":
            more = {"use_cache": False, "num_items_in_batch": num_items}
            loss = called(input_ids=tokens, labels=tokens, **more).loss
        else:
            place = {"draw": done, "first_row": dist.get_rank() * tokens.shape[0]}
            with routed.routed_forward():
                loss = called(input_ids=tokens, labels=tokens, num_items=num_items, **place)
        (loss * world).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1

    return step


def slowest(seconds: float) -> float:
    """The largest of the ranks' times."""
    both = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return float(both)


def measure(
    shape: Shape, engine: str, *, rounds: int, warmup: int, steps: int, deadline: float
) -> dict[str, list[float]]:
    """Seconds of a step of every method under one engine, in as many rounds as fit in the time on every rank."""
    generator = torch.Generator().manual_seed(SEED + dist.get_rank())
    tokens = torch.randint(0, shape.vocab, (shape.batch, shape.length), generator=generator).to(shape.device)
    made = {f"{method}, {engine}": make_step(shape, engine, method, tokens) for method in ("standard", *ROUTED)}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(warmup + rounds):
        if turn > warmup and slowest(float(_record.is_over(deadline))):
            break
        for name, step in made.items():
            wait(shape)
            dist.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                step()
            wait(shape)
            passed = slowest(time.perf_counter() - start) / steps
            if turn >= warmup:
                seconds[name].append(passed)
                if dist.get_rank() == 0:
                    print(f"{name}: {passed * 1e3:.1f} ms a step", flush=True)
    return seconds


def wait(shape: Shape) -> None:
    """Wait for this rank's device."""
    if torch.device(shape.device).type == "cuda":
        torch.cuda.synchronize()


def write(name: str, shape: Shape, seconds: dict[str, list[float]], timing: dict[str, int]) -> None:
    """Write the measurements so far."""
    ranks, control = dist.get_world_size(), CONTROL if CONTROL in seconds else next(iter(seconds))
    tokens = shape.batch * shape.length * ranks
    rows = {
        row: _record.summary(samples)
        | {"unit": "s", "tokens_per_second": _record.summary([tokens / value for value in samples])}
        | {"ratio": _record.summary([a / b for a, b in zip(seconds[control], samples, strict=False)])}
        for row, samples in seconds.items()
    }
    settings = {
        "ranks": ranks, "backend": dist.get_backend_config(), "batch_of_a_rank": shape.batch, "sequence": shape.length,
        "layers": shape.layers, "hidden": shape.hidden, "vocabulary": shape.vocab, "dtype": str(shape.dtype),
        "keep_ratio": RATIO, "optimizer": "AdamW", "seed": SEED, **timing,
    }  # fmt: skip
    _record.write(name, rows, settings=settings, control=control, device=shape.device)


def main() -> None:
    """Run one shape on the ranks of this launch; rank 0 writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=1, help="warm-up rounds")
    parser.add_argument("--steps", type=int, default=5, help="steps of a round")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--batch", type=int, help="sequences per rank, instead of the shape's own")
    parser.add_argument("--length", type=int, help="tokens per sequence, instead of the shape's own")
    _record.add_seconds(parser)
    options = parser.parse_args()
    # The same time for each engine.
    shares = [(number + 1) / len(options.engines) for number in range(len(options.engines))]
    deadlines = [_record.deadline(options.seconds and options.seconds * share) for share in shares]
    shape = on_this_rank(SHAPES[options.shape])
    sizes = {name: value for name in ("batch", "length") if (value := getattr(options, name))}
    shape = Shape(**{**vars(shape), **sizes})
    if torch.device(shape.device).type == "cuda":
        torch.cuda.set_device(shape.device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    timing = {"rounds": options.rounds, "warmup": options.warmup, "steps": options.steps}
    seconds: dict[str, list[float]] = {}
    for engine, deadline in zip(options.engines, deadlines, strict=True):
        seconds |= measure(shape, engine, **timing, deadline=deadline)
        if dist.get_rank() == 0:
            write(f"distributed_{options.shape}_{dist.get_world_size()}", shape, seconds, timing)
        # Wrapped models sit in reference cycles; three of an engine fill a third of a device.
        gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
