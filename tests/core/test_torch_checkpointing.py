"""torch's own activation checkpointing recomputes kept tokens as they were computed."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

from cggr_core import CGGRModel
from cggr_core.routing.architectures import describe
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB

MODES = [("exact", None), *((mode, engine) for mode in ("kv", "detached") for engine in ("interleaved", "two_pass"))]


def in_wrappers(model: Any, part: str) -> None:
    apply_activation_checkpointing(
        model,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.NO_REENTRANT),
        check_fn=lambda module: type(module).__name__.endswith(part),
    )


def by_hand(model: Any, part: str) -> None:
    for module in model.modules():
        if type(module).__name__.endswith(part):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def test_other_forwards_that_were_replaced_are_no_checkpointing_of_torchs() -> None:
    def own(*args: Any, **options: Any) -> None:
        """Stands for a layer's forward, and for another library's checkpointing."""

    model = ROUTABLE["llama"]()
    first = model.model.layers[0]
    for forward, wraps in (
        (partial(checkpoint, own, use_reentrant=False), True),
        (partial(checkpoint, own, use_reentrant=True), False),
        (partial(checkpoint, own), False),
        (partial(checkpoint, own, 1, use_reentrant=False), False),
        (partial(own, own, use_reentrant=False), False),
        (own, False),
    ):
        first.forward = forward
        assert describe(model).checkpoint_wrappers == ({first: own} if wraps else {})


@pytest.mark.parametrize("recompute", [in_wrappers, by_hand])
@pytest.mark.parametrize("part", ["DecoderLayer", "Attention", "MLP"])
@pytest.mark.parametrize(("gradient", "engine"), MODES)
def test_wrapped_modules(part: str, gradient: str, engine: str | None, recompute: Callable[[Any, str], None]) -> None:
    model, input_ids = ROUTABLE["llama"]().train(), torch.randint(3, VOCAB, (2, 13))
    wrapped: Any = copy.deepcopy(model)
    recompute(wrapped, part)
    found = []
    for each in (model, wrapped):
        routed = CGGRModel(each, gradient=gradient, engine=engine, selection="random", seed=3).train()
        loss = routed(input_ids, labels=input_ids)
        loss.backward()
        grads = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in gradients(each).items()}
        found.append((loss.detach(), grads))
    (loss, wanted), (wrapped_loss, grads) = found
    torch.testing.assert_close(wrapped_loss, loss)
    assert relative_error(grads, wanted) < 1e-6


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
def test_a_recomputed_attention_that_cannot_be_seen_is_named(engine: str) -> None:
    model: Any = ROUTABLE["llama"]().train()
    attention = model.model.layers[1].self_attn
    own = attention.forward
    attention.forward = lambda **arguments: checkpoint(own, use_reentrant=False, **arguments)
    input_ids = torch.randint(3, VOCAB, (2, 13))
    routed = CGGRModel(model, gradient="kv", engine=engine, selection="random").train()
    with pytest.raises(RuntimeError, match="a checkpoint inside the model recomputes"):
        routed(input_ids, labels=input_ids).backward()
