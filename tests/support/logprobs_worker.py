"""One rank of :mod:`tests.core.test_distributed`: log-probabilities of half of the batch through DDP and FSDP2."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from cggr_core import SharedContext, routed_hidden, routed_logprobs
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB

WAYS = (
    ("exact", None),
    ("kv", "interleaved"),
    ("kv", "two_pass"),
    ("detached", "interleaved"),
    ("detached", "two_pass"),
)
TIMEOUT = timedelta(minutes=2)  # a rank that dies must not leave the other waiting


def main() -> None:
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, VOCAB, (4, 80), generator=generator)
    advantages = torch.randn(4, 1, generator=generator)
    keep = torch.rand(4, 80, generator=generator) < 0.3
    keep[:, -1] = False
    keep[1] = False  # a row that is not run
    nothing_on_one = keep.clone()
    nothing_on_one[:2] = False
    mine = slice(2 * rank, 2 * rank + 2)
    for kept in (keep, nothing_on_one):
        for gradient, engine in WAYS:
            way = {"gradient_mode": gradient, "engine": engine}
            whole = ROUTABLE["llama"]()
            policy_loss(whole, input_ids, kept, advantages, kept.sum(), way).backward()
            wanted = gradients(whole)
            for prepare in (DistributedDataParallel, sharded(mesh), sharded(mesh, ends_apart=True)):
                model = ROUTABLE["llama"]()
                prepared = prepare(model)
                # Both take the mean over ranks, so each divides by its share of the global count.
                loss = policy_loss(prepared, input_ids[mine], kept[mine], advantages[mine], kept.sum() / 2, way)
                loss.backward()
                found = {name: whole_tensor(parameter.grad) for name, parameter in model.named_parameters()}
                error = relative_error(found, wanted)
                assert error <= 1e-5, (way, prepare, error)
    check_hidden(mesh, input_ids, keep, mine)
    check_shared_context(mesh, input_ids, keep, advantages, mine)


def policy_loss(
    model: nn.Module, input_ids: Tensor, keep: Tensor, advantages: Tensor, count: Tensor, way: dict
) -> Tensor:
    found = routed_logprobs(model, input_ids, keep=keep, entropy=True, **way)
    return -(advantages * found.logprob + 0.1 * found.entropy).sum() / count


def check_hidden(mesh, input_ids: Tensor, keep: Tensor, mine: slice) -> None:
    """With a separate head, instead of the model's own."""
    torch.manual_seed(0)
    head = nn.Linear(32, 1)

    def loss_of(model, rows, keep, count):
        states = routed_hidden(model, rows, keep=keep)
        return (head(states.hidden)[..., 0].tanh() * states.selection.valid).sum() / count

    whole = ROUTABLE["llama"]()
    loss_of(whole, input_ids, keep, keep.sum()).backward()
    wanted = gradients(whole)
    for prepare in (lambda model: DistributedDataParallel(model, find_unused_parameters=True), sharded(mesh)):
        model = ROUTABLE["llama"]()
        prepared = prepare(model)
        loss_of(prepared, input_ids[mine], keep[mine], keep.sum() / 2).backward()
        found = {name: whole_tensor(parameter.grad) for name, parameter in model.named_parameters()}
        found = {name: torch.zeros_like(wanted[name]) if grad is None else grad for name, grad in found.items()}
        error = relative_error(found, wanted)
        assert error <= 1e-5, error


def check_shared_context(mesh, input_ids: Tensor, keep: Tensor, advantages: Tensor, mine: slice) -> None:
    """Each rank has two completions of one prompt."""
    before, rows, kept = input_ids[::2, :20], input_ids[:, 20:], keep[:, 20:]
    prompt = slice(mine.start // 2, mine.start // 2 + 1)
    for gradient, engine in WAYS:
        way = {"gradient_mode": gradient, "engine": engine}
        whole = ROUTABLE["llama"]()
        loss = policy_loss(whole, rows, kept, advantages, kept.sum(), {**way, "context": SharedContext(before)})
        loss.backward()
        wanted = gradients(whole)
        for prepare in (DistributedDataParallel, sharded(mesh), sharded(mesh, ends_apart=True)):
            model = ROUTABLE["llama"]()
            prepared = prepare(model)
            more = {**way, "context": SharedContext(before[prompt])}
            if gradient == "exact" and prepare is not DistributedDataParallel:
                with pytest.raises(ValueError, match="not possible under fully_shard"):
                    policy_loss(prepared, rows[mine], kept[mine], advantages[mine], kept.sum() / 2, more)
                continue
            loss = policy_loss(prepared, rows[mine], kept[mine], advantages[mine], kept.sum() / 2, more)
            loss.backward()
            found = {name: whole_tensor(parameter.grad) for name, parameter in model.named_parameters()}
            error = relative_error(found, wanted)
            assert error <= 1e-5, (way, prepare, error)


def sharded(mesh, *, ends_apart: bool = False):
    def prepare(model):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        if ends_apart:
            fully_shard(model.get_input_embeddings(), mesh=mesh)
            fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
        return fully_shard(model, mesh=mesh)

    return prepare


def whole_tensor(grad: Tensor | None) -> Tensor | None:
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad
