"""Recorded steps on the CPU, where a replay runs the pass again: their numbers, and what autograd sees."""

import copy
import pickle

import pytest
import torch

from cggr_core import CGGRModel, create_truncated_router
from cggr_core.recording.model_state import ModelState
from tests.support.model_steps import backward, checkpoint_activations, tokens
from tests.support.recorded_steps import (
    ENOUGH,
    batch,
    hold_to_eager,
    record_at_once,
    recorded,
    recording_model,
    replayed,
)
from tests.support.tiny_models import ROUTABLE


@pytest.fixture(autouse=True)
def _recorded_at_once(monkeypatch):
    record_at_once(monkeypatch)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient": "kv", "selection": "sampled"},
        {"gradient": "kv", "selection": "stratified", "depth": 1},
        {"gradient": "detached", "selection": "random"},
        {"gradient": "detached", "selection": "topk", "engine": "two_pass"},
        {"gradient": "exact", "selection": "sampled"},
        {"gradient": "sequence", "selection": "sampled"},
    ],
)
def test_the_numbers_of_the_steps_as_they_are(settings):
    """Over optimizer steps of two micro-batches, clipped, with gradients set to None and to zero in between."""
    steps = [[batch(2 * step), batch(2 * step + 1)] for step in range(4)]
    assert hold_to_eager(ROUTABLE["llama"](), steps, **settings)[1:] == [True] * 3


def test_what_changes_from_step_to_step():
    """Draws, first rows, items, weights and masks are read again; each shape has its own recording."""
    steps = []
    for step in range(5):
        weight = torch.rand(3, 12, generator=torch.Generator().manual_seed(step))
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[0, : step % 4] = 0
        labels = tokens(seed=step).masked_fill(mask == 0, -100)
        labels[1, step % 12] = -100
        first = {"input_ids": tokens(seed=step), "labels": labels, "attention_mask": mask, "token_weight": weight}
        numbers = {"num_items": torch.tensor(40 + step) if step % 2 else 40 + step, "draw": 3 * step}
        steps.append([{**first, **numbers}, batch(step, length=9, num_items=30, first_row=step, draw=1)])
    assert hold_to_eager(ROUTABLE["mistral-sliding"](), steps, selection="random", tolerance=1e-6)[-2:] == [True] * 2


@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding", "bert-masked"])
@pytest.mark.parametrize("gradient", ["exact", "sequence"])
def test_padding_is_not_looked_at(gradient, architecture):
    """transformers asks on the host whether a mask holds any padding; a recording cannot, and builds the mask."""
    steps = []
    for step in range(5):
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[0, 12 - step % 3 :] = 0
        labels = tokens(seed=step).masked_fill(mask == 0, -100)
        steps.append([{"input_ids": tokens(seed=step), "labels": labels, "attention_mask": mask}])
    settings = {"gradient": gradient, "selection": "random", "tolerance": 1e-6}
    assert hold_to_eager(ROUTABLE[architecture](), steps, **settings)[-2:] == [True] * 2


def test_packed_rows_are_not_looked_for():
    """Two documents in every row, at different places in each step, and a single document."""
    steps = []
    for step in range(5):
        positions = torch.cat([torch.arange(4 + step), torch.arange(8 - step)]).expand(3, -1)
        positions = torch.arange(12).expand(3, -1) if step == 3 else positions
        steps.append([batch(step, position_ids=positions)])
    settings = {"gradient": "exact", "selection": "random", "tolerance": 1e-6}
    assert hold_to_eager(ROUTABLE["llama"](), steps, **settings)[-2:] == [True] * 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.config, "attention_dropout", 0.5),
        lambda model: model.config.rope_parameters.update(rope_theta=5.0),
        lambda model: setattr(model.model, "config", copy.deepcopy(model.config)),
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 2.0),
        lambda model: model.eval(),
    ],
)
def test_what_a_recording_has_built_in_is_looked_at(change):
    """Models read numbers from their config in every forward, which a replay would not."""
    model = ROUTABLE["llama"]()
    state = ModelState(model)
    assert state.holds()
    change(model)
    assert not state.holds()


def test_autocast_and_a_gradient_scale():
    steps = [[batch(step)] for step in range(4)]
    found = hold_to_eager(ROUTABLE["llama"](), steps, selection="random", autocast=torch.bfloat16, scale=2.0**10)
    assert found[-2:] == [True] * 2


def test_frozen_tied_and_unused_parameters():
    base = ROUTABLE["llama"](tie_word_embeddings=True)
    base.model.layers[0].requires_grad_(False)
    base.model.layers[1].register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    assert hold_to_eager(base, [[batch(step)] for step in range(4)], selection="random")[-2:] == [True] * 2


def test_draws_are_counted_through():
    """A replay uses the next draw number, and the state has their count."""
    model, plain = recorded(), CGGRModel(ROUTABLE["llama"](), selection="random")
    for seed in range(ENOUGH):
        backward(plain, tokens(seed=seed))
    kept = {model(**batch(0)).item() for _ in range(3)}
    assert len(kept) > 1
    assert model.routing_state_dict()["draws"] == ENOUGH + 3
    model.load_routing_state_dict(plain.routing_state_dict())
    torch.testing.assert_close(model(**batch(5)), plain(**batch(5)))


def test_nobody_holds_what_a_replay_changes():
    model = recorded()
    loss = model(**batch(0))
    before, metrics = loss.item(), model.metrics
    kept = {name: value.clone() for name, value in metrics.items() if isinstance(value, torch.Tensor)}
    loss.backward()
    first = [parameter.grad for parameter in model.parameters()]
    values = [gradient.clone() for gradient in first]
    model.zero_grad(set_to_none=True)
    backward(model, tokens(seed=1))
    assert loss.item() == before
    assert all(torch.equal(metrics[name], value) for name, value in kept.items())
    assert all(torch.equal(gradient, value) for gradient, value in zip(first, values, strict=True))


def test_hooks_on_parameters_see_the_gradients_once():
    model, seen = recorded(), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.norm()))
    backward(model, tokens())
    assert replayed(model)
    assert len(seen) == len(list(model.parameters()))


def test_two_forwards_before_the_first_backward():
    """The second runs eagerly, since the first one's activations are still needed."""
    model, plain = recorded(), CGGRModel(ROUTABLE["llama"](), selection="random")
    draws = [{"draw": 5}, {"draw": 6}]
    first = model(**batch(0), **draws[0])
    second = model(**batch(1), **draws[1])
    assert not replayed(model)
    (first + second).backward()
    (plain(**batch(0), **draws[0]) + plain(**batch(1), **draws[1])).backward()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)
    del first, second
    backward(model, tokens())
    assert replayed(model)


def test_a_loss_that_is_dropped_awaits_no_backward():
    model = recorded()
    model(**batch(0))
    model(**batch(1))
    assert replayed(model)


def test_a_second_backward_is_refused():
    model = recorded()
    loss = model(**batch(0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"can run only once, even with retain_graph=True; .* cuda_graph=False"):
        loss.backward()


@pytest.mark.parametrize(
    "settings",
    [
        {"selection": "random"},
        {"selection": "sampled"},
        {"gradient": "detached", "selection": "topk", "depth": 1},
        {"gradient": "exact", "min_tokens_ratio": 1.0, "selection": "random"},
        {"gradient": "exact", "selection": "supervised"},
        {"gradient": "sequence", "selection": "sampled", "min_tokens_ratio": 0.5},
    ],
)
def test_checkpointed_layers(settings):
    """Recomputed by the backward pass of the recording, without the random state that the host would keep."""
    base = ROUTABLE["llama"]()
    checkpoint_activations(base)
    steps = [[batch(2 * step), batch(2 * step + 1)] for step in range(4)]
    assert hold_to_eager(base, steps, **settings)[1:] == [True] * 3


def test_dropout_draws_as_it_would(monkeypatch):
    """A recording leaves the random state of a step, and every replay draws again."""
    model = recording_model(ROUTABLE["llama"](attention_dropout=0.3), selection="random")
    torch.manual_seed(0)
    for draw in range(ENOUGH):
        backward(model, tokens(), draw=draw)
    assert replayed(model)
    after = torch.get_rng_state()
    plain = CGGRModel(ROUTABLE["llama"](attention_dropout=0.3), selection="random")
    torch.manual_seed(0)
    for draw in range(ENOUGH):
        loss, _ = backward(plain, tokens(), draw=draw)
    assert torch.equal(after, torch.get_rng_state())
    assert model.metrics["loss"] == loss


def test_eval_and_no_labels_are_the_models_own():
    model = recorded()
    assert model(input_ids=tokens()).logits.shape == (3, 12, 97)
    model.eval()
    assert model(**batch(0)).loss.dim() == 0
    model.train()
    backward(model, tokens())
    assert replayed(model)


def test_copies_record_for_themselves():
    model = recorded()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied._recorder is None
        copied(**batch(0)).backward()


def test_without_effect_on_the_cpu():
    model = CGGRModel(ROUTABLE["llama"](), create_truncated_router(ROUTABLE["llama"](), 1), cuda_graph="auto")
    for seed in range(ENOUGH):
        backward(model, tokens(seed=seed))
    assert not replayed(model)


@pytest.mark.parametrize("value", [True, "on", None, 0])
def test_the_setting_is_checked(value):
    with pytest.raises(ValueError, match=r"cuda_graph must be 'auto' or False, got "):
        CGGRModel(ROUTABLE["llama"](), cuda_graph=value)
