"""``torch.compile`` of a CGGRModel, and of the model that it wraps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cggr_core import CGGRModel, routed_logprobs
from tests.support.tiny_models import ROUTABLE, VOCAB

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")


def step(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    loss = model(input_ids, labels=input_ids)
    loss.backward()
    return loss.detach()


def in_place(model: Any) -> Any:
    model.compile()
    return model


@pytest.mark.parametrize("compiled", [torch.compile, in_place])
@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_a_compiled_wrapper_trains(compiled: Callable[[Any], Any], gradient: str) -> None:
    model, input_ids = ROUTABLE["llama"](), torch.randint(3, VOCAB, (2, 12))
    settings: dict[str, Any] = {"gradient": gradient, "selection": "random", "seed": 3}
    wanted = step(CGGRModel(model, **settings).train(), input_ids)
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    assert torch.equal(step(compiled(CGGRModel(model, **settings).train()), input_ids), wanted)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("compiled", [torch.compile, in_place])
@pytest.mark.parametrize("part", ["model", "layer"])
def test_what_was_compiled_before_is_refused(compiled: Callable[[Any], Any], part: str) -> None:
    model = ROUTABLE["llama"]()
    if part == "model":
        model = compiled(model)
    else:
        model.model.layers[0] = compiled(model.model.layers[0])
    with pytest.raises(ValueError, match=r"was compiled .*wrap the model without torch\.compile"):
        CGGRModel(model)
    input_ids = torch.randint(3, VOCAB, (2, 12))
    with pytest.raises(ValueError, match=r"was compiled .*wrap the model without torch\.compile"):
        routed_logprobs(model, input_ids, keep=torch.arange(12).expand(2, -1) < 6)


def test_what_was_compiled_since_the_first_call_is_refused() -> None:
    model, input_ids = ROUTABLE["llama"](), torch.randint(3, VOCAB, (2, 12))
    keep = torch.arange(12).expand(2, -1) < 6
    routed_logprobs(model, input_ids, keep=keep)
    for compiled in (torch.compile(model), in_place(model)):
        with pytest.raises(ValueError, match="was compiled"):
            routed_logprobs(compiled, input_ids, keep=keep)


@pytest.mark.parametrize("compiled", [torch.compile, in_place])
@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_layers_compiled_since_a_step_are_refused_in_every_step(compiled: Callable[[Any], Any], gradient: str) -> None:
    model: Any = ROUTABLE["llama"]()
    input_ids = torch.randint(3, VOCAB, (2, 12))
    routed = CGGRModel(model, gradient=gradient).train()
    step(routed, input_ids)
    model.model.layers[1] = compiled(model.model.layers[1])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"was compiled \(its model\.layers\.1\)"):
            step(routed, input_ids)
        with pytest.raises(ValueError, match=r"was compiled \(its model\.layers\.1\)"):
            routed_logprobs(model, input_ids, keep=torch.arange(12).expand(2, -1) < 6)
