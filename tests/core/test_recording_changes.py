"""Which changes cause a step to be recorded again, and how many recordings are kept."""

import copy

import pytest
import torch

from cggr_core import CGGRModel
from cggr_core.recording import recorder
from tests.support.model_steps import backward, tokens
from tests.support.recorded_steps import (
    ENOUGH,
    batch,
    reason_of,
    record_at_once,
    recorded,
    replayed,
)


@pytest.fixture(autouse=True)
def _recorded_at_once(monkeypatch):
    record_at_once(monkeypatch)


def change_weights(model):
    model.model.lm_head.weight.data = model.model.lm_head.weight.data.clone()


def change_training(model):
    model.model.lm_head.weight.requires_grad_(False)


def change_a_module(model):
    model.model.model.layers[1].mlp.eval()


def change_a_number(model):
    model.model.model.layers[1].self_attn.scaling *= 2


def change_the_head(model):
    model.model.resize_token_embeddings(101)


def change_what_is_loaded(model):
    model.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "change",
    [change_weights, change_training, change_a_module, change_a_number, change_the_head, change_what_is_loaded],
)
def test_a_changed_model_is_recorded_anew(change):
    model = recorded()
    change(model)
    plain = CGGRModel(copy.deepcopy(model.model), selection="random")
    assert "has occurred" in reason_of(model, draw=3)
    for draw in range(ENOUGH):
        loss, found = backward(model, tokens(seed=draw), draw=draw)
        expected_loss, expected = backward(plain, tokens(seed=draw), draw=draw)
        torch.testing.assert_close(loss, expected_loss)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found, expected)
    assert replayed(model)


def test_weights_that_are_changed_in_place_are_read_anew():
    model = recorded()
    before = model(**batch(0), draw=1).item()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert model(**batch(0), draw=1).item() != before
    assert replayed(model)


def test_no_more_than_a_few_are_held(monkeypatch):
    """The least recently used one is dropped, and recorded again after as many steps as any other."""
    monkeypatch.setattr(recorder, "MOST_RECORDINGS", 2)
    model = recorded()
    for length in (5, 12, 6):  # 5 is what rests when 6 comes
        for seed in range(ENOUGH):
            backward(model, tokens(length=length, seed=seed))
        assert replayed(model)
    assert model._recorder.recordings == 2
    backward(model, tokens())
    assert replayed(model)
    for again in (False, True):
        backward(model, tokens(length=5))
        assert replayed(model) is again
