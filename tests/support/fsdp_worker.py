"""One rank of :mod:`test_distributed`: half of the batch through FSDP2, gradients compared with the whole batch."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from cggr_core import CGGRModel, create_truncated_router
from cggr_core.experimental import LearnedRouter
from cggr_core.routing import sharding
from tests.support.model_steps import checkpoint_activations
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB

SETTINGS = (
    {"gradient": "exact"},
    {"gradient": "kv", "engine": "interleaved", "selection": "random"},
    {"gradient": "kv", "selection": "supervised"},
    {"gradient": "kv", "engine": "two_pass"},
    {"gradient": "kv", "router": 1},
    {"gradient": "kv", "router": LearnedRouter},
    {"gradient": "detached", "engine": "interleaved", "selection": "random"},
    {"gradient": "detached", "engine": "two_pass"},
    {"gradient": "detached", "router": 1},
    {"gradient": "sequence", "min_tokens_ratio": 1.0},
)
# Every mode and engine in the plainest way; those that differ in what reaches the ends of the model, also as Accelerate
# groups what stands before and after the layers.
LAYOUTS = {
    "layers and root": SETTINGS,
    "ends apart": (SETTINGS[0], SETTINGS[1], SETTINGS[3], SETTINGS[4]),
    "ends apart, tied": (SETTINGS[0], SETTINGS[1], SETTINGS[3], SETTINGS[4]),
}


class Gathers(TorchDispatchMode):
    """Counts the times that weights are gathered."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "allgather" in str(func)
        return func(*args, **(kwargs or {}))


def gathered_once(routed: CGGRModel, input_ids: torch.Tensor, mesh: object) -> None:
    """Weights stay gathered between the passes from the third step on, and no longer than that."""
    model = routed.model
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def step() -> int:
        with Gathers() as seen, routed.routed_forward():
            model(input_ids=input_ids, labels=input_ids).backward()
        model.zero_grad()
        return seen.count

    def fail(module: torch.nn.Module, args: object) -> None:
        passes.append(module)
        if failing and len(passes) == 2:
            raise RuntimeError("the gradient pass")

    passes: list[torch.nn.Module] = []
    failing = False
    hook = model.model.layers[1].register_forward_pre_hook(fail)
    layers = len(model.model.layers)
    step()  # looks at the model first
    gathers = [step() for _ in range(3)]
    assert gathers[0] - gathers[1] == layers and gathers[1] == gathers[2], gathers

    # The shards, as an optimizer has them. What stands around the layers stays gathered after any forward that failed.
    trained = list(model.model.layers.parameters())
    passes.clear()
    failing = True
    with pytest.raises(RuntimeError, match="the gradient pass"):
        step()
    hook.remove()
    with torch.no_grad():
        for parameter in trained:
            parameter.mul_(1.5)
    whole = ROUTABLE["llama"]().train()
    # The model first: reading its state shards all of it again.
    losses = [model(input_ids=input_ids, labels=input_ids).loss.item()]
    whole.load_state_dict({name: value.full_tensor() for name, value in model.state_dict().items()})
    losses.append(whole(input_ids=input_ids, labels=input_ids).loss.item())
    assert abs(losses[0] - losses[1]) <= 1e-5, losses


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    input_ids = torch.randint(3, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[0, :7] = -100
    count = (labels[:, 1:] != -100).sum()
    mine = slice(2 * rank, 2 * rank + 2)

    def build(settings: dict, layout: str) -> CGGRModel:
        model = ROUTABLE["llama"](tie_word_embeddings="tied" in layout).train()
        if layout != "layers and root":
            checkpoint_activations(model)
        router = settings.get("router")
        if router is LearnedRouter:
            router = LearnedRouter(depth=1, width=8)
        elif router is not None:
            router = create_truncated_router(model, num_layers=router)
        return CGGRModel(model, **{**settings, "router": router}).train()

    gathered_once(build({"gradient": "kv", "engine": "two_pass"}, "layers and root"), input_ids[mine], mesh)
    for layout, every in LAYOUTS.items():
        sharding.DECIDED_AFTER = 1 if layout == "layers and root" else 3
        for settings in every:
            whole = build(settings, layout)
            whole(input_ids, labels=labels, draw=0).backward()
            wanted = gradients(whole.model)
            routed = build(settings, layout)
            model = routed.model
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            if layout == "ends apart":
                fully_shard(model.get_input_embeddings(), mesh=mesh)
                fully_shard([model.model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
            if layout == "ends apart, tied":
                ends = [model.model.norm, model.get_input_embeddings(), model.lm_head]
                fully_shard(ends, mesh=mesh, reshard_after_forward=False)
            fully_shard(model, mesh=mesh)
            with routed.routed_forward():
                # FSDP2 takes the mean over ranks, so each divides by its share of the global count.
                loss = model(
                    input_ids=input_ids[mine], labels=labels[mine], num_items=count / 2, draw=0, first_row=mine.start
                )
            loss.backward()
            found = {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()}
            error = relative_error(found, wanted)
            assert error <= 1e-5, (settings, layout, error)
