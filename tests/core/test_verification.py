"""``CGGR_VERIFY``, and when the model is probed again."""

from typing import Any

import pytest
import torch

from cggr_core import CGGRModel
from cggr_core.routing import engine as engine_module
from cggr_core.routing import findings
from cggr_core.routing import gradient_pass as passes
from tests.support.tiny_models import GPT_NEO, ROUTABLE, VOCAB


def tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, length))


def step(model: CGGRModel, length: int = 12) -> None:
    input_ids = tokens(length)
    model(input_ids, labels=input_ids).backward()


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
def test_every_nth_pass_is_held_to_a_plain_forward(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGGR_VERIFY", "2")
    model = CGGRModel(ROUTABLE["llama"](), gradient="kv", engine=engine, selection="random").train()
    compared: list[Any] = []
    own = engine_module.difference
    monkeypatch.setattr(engine_module, "difference", lambda *a, **k: compared.append(own(*a, **k)))
    for _ in range(5):
        step(model)
    assert compared == [None, None, None]


def test_a_difference_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGGR_VERIFY", "2")
    model = CGGRModel(ROUTABLE["llama"](), gradient="kv", selection="random").train()
    step(model)
    step(model)

    class Misplaced(passes.LayerRows):
        def hidden(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().hidden(hidden).roll(1, dims=1)

    monkeypatch.setattr(passes, "LayerRows", Misplaced)
    with pytest.raises(RuntimeError, match="in routed pass 3, LlamaForCausalLM computes different values"):
        step(model)


@pytest.mark.parametrize("value", ["0", "-1", "yes", "1.5"])
def test_wrong_values_are_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGGR_VERIFY", value)
    with pytest.raises(ValueError, match=r"CGGR_VERIFY=.* must be a whole number n of at least 1"):
        CGGRModel(ROUTABLE["llama"]())


def test_the_model_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    for name in ("probe", "probe_whole_rows"):
        own = getattr(findings, name)
        monkeypatch.setattr(findings, name, lambda *a, own=own, **k: (looked.append(1), own(*a, **k))[1])
    model = CGGRModel(ROUTABLE["llama"](), gradient="kv", selection="random").train()
    step(model)
    step(model)
    step(model, length=8)
    assert len(looked) == 1
    step(model, length=16)
    assert len(looked) == 2, "rows are longer than those it was looked at on"
    model.model.load_state_dict(model.model.state_dict())
    step(model)
    assert len(looked) == 3, "weights were loaded"
    step(model, length=16)
    assert len(looked) == 3


@pytest.mark.parametrize("after", [0, 1])
def test_layers_left_out_at_random_are_refused(after: int) -> None:
    """Whether they are from the start or only after a step."""
    model = ROUTABLE["opt"]()
    routed = CGGRModel(model, gradient="kv", selection="random").train()
    for _ in range(after):
        step(routed)
    model.model.decoder.layerdrop = 0.1
    with pytest.raises(ValueError, match=r"layerdrop=0.1"):
        step(routed)
    step(CGGRModel(model, gradient="exact", selection="random").train())


@pytest.mark.parametrize("layout", ["whole", "padded", "packed"])
@pytest.mark.parametrize("length", [9, 33])
def test_layers_that_take_queries_for_the_last_ones_are_refused(layout: str, length: int) -> None:
    """GPT-Neo's window is a buffer's last rows: with short documents, tokens near the row's end hide that."""
    model, input_ids = GPT_NEO(window_size=6), tokens(length)
    given: dict[str, torch.Tensor] = {}
    if layout == "padded":
        given["attention_mask"] = torch.ones_like(input_ids)
        given["attention_mask"][0, :3], given["attention_mask"][1, -3:] = 0, 0
    if layout == "packed":
        given["position_ids"] = (torch.arange(length) % 5).expand(2, length)
    with pytest.raises(ValueError, match=r"different values for kept tokens than|does not run on kept tokens"):
        CGGRModel(model, gradient="kv", selection="random").train()(input_ids, labels=input_ids, **given)
