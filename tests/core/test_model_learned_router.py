"""CGGRModel with a learned router: routing stays exact, the head learns, and its gradients do not reach the model."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

import cggr_core.step.selecting
from cggr_core import CGGRModel, CGGRScorer, Selection
from cggr_core.experimental import LearnedRouter
from cggr_core.step import Observation
from tests.support.model_steps import MODES, ROUTED, backward, checkpoint_activations, tokens
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, UNROUTABLE, VOCAB


def learned(model, *, forwards: int = 0, depth: int = 1, router: LearnedRouter | None = None, **settings) -> CGGRModel:
    """A model whose router has seen some forwards, so that its scores differ from token to token."""
    router = router or LearnedRouter(depth, width=8, learning_rate=1e-2)
    wrapped = CGGRModel(model, router, min_tokens_ratio=0.4, selection="sampled", seed=3, **settings)
    for seed in range(forwards):
        backward(wrapped, tokens(seed=seed))
    return wrapped


@pytest.fixture
def selections(monkeypatch):
    """Every selection that is made."""
    made, select = [], cggr_core.step.selecting.select
    monkeypatch.setattr(
        cggr_core.step.selecting, "select", lambda *args, **kwargs: made.append(select(*args, **kwargs)) or made[-1]
    )
    return made


@pytest.mark.parametrize(("gradient", "engine"), [*ROUTED, ("exact", None)])
@pytest.mark.parametrize("name", ["llama", "bert-masked", "mixtral"])
def test_the_step_is_that_of_the_selection(name, gradient, engine, selections):
    """Loss and gradients are those of a model without a router that is given the same selection."""
    model, input_ids = ROUTABLE[name](), tokens()
    wrapped = learned(model, forwards=2, gradient=gradient, engine=engine)
    loss, found = backward(wrapped, input_ids)
    assert wrapped.metrics["engine"] == (engine or "plain")
    assert wrapped.metrics["score_kept"] != wrapped.metrics["score_dropped"]
    plain = CGGRModel(model, gradient=gradient)
    wanted_loss, wanted = backward(plain, input_ids, selection=selections[-1])
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("gradient", MODES)
def test_learns_in_every_mode(gradient):
    model, input_ids = ROUTABLE["llama"](), tokens(rows=6, length=24)
    wrapped = learned(model, gradient=gradient)
    correlations = []
    for _ in range(25):
        wrapped(input_ids, labels=input_ids)
        correlations.append(wrapped.metrics["router_correlation"].item())
    assert correlations[0] == 0
    assert sum(correlations[-5:]) / 5 > 0.7


@pytest.mark.parametrize("gradient", ["exact", "sequence"])
def test_architectures_without_keys_and_values(gradient):
    model, input_ids = UNROUTABLE["mamba"](), tokens()
    wrapped = learned(model, gradient=gradient)
    backward(wrapped, input_ids)
    backward(wrapped, input_ids)
    assert wrapped.metrics["router_correlation"] != 0


def test_nothing_of_it_reaches_the_model():
    model, input_ids = ROUTABLE["llama"](), tokens()
    wrapped = learned(model, forwards=1)
    weights = {name: value.clone() for name, value in wrapped.router.state_dict().items() if name != "_extra_state"}
    backward(wrapped, input_ids)
    assert {name for name in wrapped.state_dict() if not name.startswith("router.")} == {
        f"model.{name}" for name in model.state_dict()
    }
    mine = {name: value for name, value in wrapped.named_parameters() if name.startswith("router.")}
    assert mine and all(value.grad is None and not value.requires_grad for value in mine.values())
    assert any(not torch.equal(value, weights[name.removeprefix("router.")]) for name, value in mine.items())
    norm = torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
    assert norm == 0, "the model's gradients were cleared, and the router has none"


def test_without_gradients_nothing_is_learned():
    model, input_ids = ROUTABLE["llama"](), tokens()
    wrapped = learned(model, forwards=1)
    updates = wrapped.router.updates.item()
    with torch.no_grad():
        wrapped(input_ids, labels=input_ids)
    assert wrapped.router.updates == updates


def test_every_layer_runs_once_in_exact_mode():
    model, input_ids = ROUTABLE["llama"](), tokens()
    calls = []
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, n=n: calls.append(n)) for n, layer in enumerate(model.model.layers)
    ]
    wrapped = learned(model, forwards=1, gradient="exact")
    calls.clear()
    backward(wrapped, input_ids)
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1, 2]


class VocabularyProducts(TorchDispatchMode):
    """Counts the rows of all matrix products with the vocabulary."""

    PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.PRODUCTS and output.shape[-1] == VOCAB:
            self.rows += output.numel() // VOCAB
        return output


@pytest.mark.parametrize(("gradient", "engine"), [*ROUTED, ("exact", None), ("sequence", None)])
def test_the_vocabulary_meets_no_more_than_kept_and_observed_tokens(gradient, engine):
    model, input_ids = ROUTABLE["llama"](), tokens(rows=4, length=24)
    router = LearnedRouter(1, width=4, observed_tokens=8)
    wrapped = learned(model, forwards=1, router=router, gradient=gradient, engine=engine)
    backward(wrapped, input_ids)  # a first batch of its size is looked at
    with VocabularyProducts() as products:
        wrapped(input_ids, labels=input_ids)
    kept = 2 * 24 if gradient == "sequence" else 4 * 10  # slots of 0.4 of the rows, or of the tokens
    assert wrapped.metrics["kept_tokens"] <= products.rows <= kept + 8 < input_ids.numel()
    assert wrapped.metrics["router_correlation"] != 0


def test_observed_tokens_are_drawn_with_the_same_probability():
    """Thinned slots are evenly spaced from a random start, so that none is left out forever."""
    slots = torch.arange(10).expand(2, 10)
    of_a_step = (None,) * 4
    whole = Observation(*of_a_step, slots[..., None].float(), slots, slots.float(), torch.arange(2), slots, None)
    counts = torch.zeros(10)
    for draw in range(800):
        thinned = whole.thinned(6, seed=0, draw=torch.tensor(draw))
        assert thinned.targets.shape == (2, 3)
        counts[thinned.targets[0]] += 1
    torch.testing.assert_close(counts / 800, torch.full((10,), 0.3), rtol=0, atol=0.07)
    assert whole.thinned(100, seed=0, draw=torch.tensor(0)) is whole


def test_a_loss_without_weights_leaves_the_regression_corrected(monkeypatch, selections):
    model, input_ids = ROUTABLE["llama"](), tokens(length=24)
    wrapped = learned(model, forwards=2, unbiased=False)
    seen, learn = [], wrapped.router.learn
    monkeypatch.setattr(wrapped.router, "learn", lambda h, t, s, weight: seen.append(weight) or learn(h, t, s, weight))
    loss, found = backward(wrapped, input_ids)
    weight = selections[-1].weight
    assert len(weight[weight > 0].unique()) > 3
    torch.testing.assert_close(seen[0], weight.flatten())
    kept = CGGRModel(model, unbiased=False, selection="sampled", min_tokens_ratio=0.4)
    plain = (selections[-1].valid / selections[-1].valid.sum(1, keepdim=True) * 23).float()
    wanted_loss, wanted = backward(kept, input_ids, selection=dataclasses.replace(selections[-1], weight=plain))
    torch.testing.assert_close(loss, wanted_loss)
    assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("gradient", ["kv", "exact"])
def test_a_resumed_run_makes_the_same_selections(gradient):
    input_ids = tokens(length=24)
    whole = learned(ROUTABLE["llama"](), gradient=gradient, warmup_steps=2)
    losses = []
    for step in range(6):
        losses.append(backward(whole, input_ids)[0])
        whole.step()
        if step == 3:
            state = whole.routing_state_dict()
    resumed = learned(ROUTABLE["llama"](), gradient=gradient, warmup_steps=2)
    resumed.load_routing_state_dict(state)
    for step in range(4, 6):
        assert torch.equal(backward(resumed, input_ids)[0], losses[step])
        resumed.step()
    assert len({loss.item() for loss in losses[2:]}) == 4


def test_state_of_another_kind_of_model():
    model = ROUTABLE["llama"]()
    with pytest.raises(ValueError, match="has nothing for a learned router, but this model has a LearnedRouter"):
        learned(model).load_routing_state_dict(CGGRModel(model).routing_state_dict())
    with pytest.raises(ValueError, match="is of a learned router, but this model has none"):
        CGGRModel(model).load_routing_state_dict(learned(model).routing_state_dict())


def test_everything_kept_teaches_too():
    model, input_ids = ROUTABLE["llama"](), tokens()
    for gradient in MODES:
        wrapped = CGGRModel(model, LearnedRouter(1, width=4), gradient=gradient, min_tokens_ratio=1.0)
        loss, found = backward(wrapped, input_ids)
        plain = model(input_ids=input_ids, labels=input_ids).loss
        plain.backward()
        torch.testing.assert_close(loss, plain.detach(), rtol=1e-5, atol=0)
        assert relative_error(found, gradients(model)) <= 1e-5
        assert wrapped.router.updates == 1
        assert wrapped.router.moments[0] == 33


# peft asks transformers by a name that newer versions have renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("gradient", "engine"), [("kv", "interleaved"), ("kv", "two_pass"), ("exact", None)])
def test_autocast_checkpointing_and_lora(gradient, engine):
    model, input_ids = ROUTABLE["llama"](), tokens()
    checkpoint_activations(model)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4))
    wrapped = learned(model, gradient=gradient, engine=engine)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = wrapped(input_ids, labels=input_ids)
        loss.backward()
    found = gradients(model)
    assert any("lora_B" in name and value.abs().sum() > 0 for name, value in found.items())
    assert wrapped.metrics["router_correlation"] != 0
    assert all(value.dtype == torch.float32 for value in wrapped.router.parameters())


def test_a_passed_selection_is_not_the_routers_business():
    model, input_ids = ROUTABLE["llama"](), tokens()
    wrapped = learned(model)
    selection = Selection.from_mask(torch.ones(3, 12, dtype=torch.bool).tril(), capacity=12)
    backward(wrapped, input_ids, selection=selection)
    assert wrapped.router.updates == 0
    assert "router_correlation" not in wrapped.metrics


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selection": "random"}, "uses no score; leave router=None"),
        ({"dynamic_threshold": True}, "LearnedRouter gives only scores"),
        ({"router": LearnedRouter(3)}, "the model has only 3; give a smaller depth"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CGGRModel(ROUTABLE["llama"](), **{"router": LearnedRouter(1), **settings})


def test_not_in_a_scorer():
    with pytest.raises(TypeError, match="a LearnedRouter works only in CGGRModel"):
        CGGRScorer(LearnedRouter(1))
