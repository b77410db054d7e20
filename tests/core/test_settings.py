"""Names, defaults and checks are written once, and every constructor reads them there."""

import inspect

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from cggr_core import CGGRLinearLoss, CGGRLoss, CGGRModel, CGGRScorer, Schedule, create_truncated_router, select
from cggr_core.settings import (
    MODEL_SELECTIONS,
    SCORELESS,
    SELECTIONS,
    WITH_PROBABILITIES,
    RoutingSettings,
    SelectionSettings,
    default_router_depth,
)
from tests.support.model_steps import tokens
from tests.support.tiny_models import ROUTABLE


@pytest.mark.parametrize("public", [CGGRModel, CGGRLoss, CGGRLinearLoss, CGGRScorer, Schedule, select])
def test_defaults_are_those_of_the_settings(public):
    parameters = inspect.signature(public).parameters
    shared = {name: p.default for name, p in parameters.items() if hasattr(RoutingSettings, name)}
    assert len(shared) >= 4
    assert shared == {name: getattr(RoutingSettings, name) for name in shared}


def test_constructors_hold_what_they_were_given():
    given = {"selection": "topk", "scoring": "loss", "min_tokens_ratio": 0.5, "seed": 3, "block_size": 2}
    for made in (CGGRLoss(**given), CGGRLinearLoss(**given), CGGRScorer(lambda ids: None, **given)):
        assert made.settings == SelectionSettings(**given)
    assert CGGRModel(ROUTABLE["llama"](), gradient="exact", **given).settings == RoutingSettings(
        gradient="exact", **given
    )


def test_the_sets_of_selections():
    assert set(MODEL_SELECTIONS) == {*SELECTIONS, "supervised"}
    assert set(SELECTIONS) > WITH_PROBABILITIES
    assert {name for name in MODEL_SELECTIONS if not RoutingSettings(selection=name).reads_scores} == SCORELESS


@pytest.mark.parametrize("made", [CGGRLoss, SelectionSettings])
def test_supervised_is_a_models_selection(made):
    with pytest.raises(ValueError, match=r"selection must be one of 'stratified', 'sampled', .* got 'supervised'"):
        made(selection="supervised")


@pytest.mark.parametrize(("layers", "depth"), [(0, 1), (4, 1), (16, 2), (30, 3), (32, 4)])
def test_a_router_is_an_eighth_of_the_model(layers, depth):
    assert default_router_depth(layers) == depth
    assert create_truncated_router(ROUTABLE["llama"]()).num_layers == 1


def test_short_rows_keep_their_least_number():
    """A row of four countable tokens keeps one of them by its share, and all four where that is the least."""
    model, input_ids = ROUTABLE["llama"](), tokens(rows=2, length=24)
    labels = input_ids.clone()
    labels[0, :20] = -100

    def kept(**settings):
        wrapped = CGGRModel(model, gradient="exact", min_tokens_ratio=0.25, **settings)
        wrapped(input_ids, labels=labels)
        return wrapped.metrics["kept_tokens"].item()

    of_the_long_row = 6  # a quarter of 23
    assert kept(selection="topk") == of_the_long_row + 1
    assert kept(selection="sequence_aware", min_tokens_per_sequence=4) == of_the_long_row + 4


@pytest.mark.parametrize(
    ("settings", "waits"),
    [
        ({}, False),
        ({"dynamic_threshold": True, "threshold_sensitivity": 0.0}, False),
        ({"dynamic_threshold": True}, True),
    ],
)
def test_a_threshold_that_is_off_waits_for_no_device(settings, waits, monkeypatch):
    wrapped, input_ids, asked = CGGRModel(ROUTABLE["llama"](), **settings), tokens(), []
    monitor = wrapped._deferred._monitor
    monkeypatch.setattr(monitor, "read", lambda *, wait=False: asked.append(wait))
    wrapped(input_ids, labels=input_ids)
    assert asked == [waits]
    assert ("confidence" in wrapped.metrics) == waits


def test_blocks_leave_more_of_the_gradient():
    """If tokens attend to their neighbours and gradients reach only kept tokens, keeping neighbours together helps."""
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, max_position_embeddings=64, sliding_window=4)
    ).train()  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)  # starting weights attend to all tokens alike
    input_ids = torch.randint(0, 48, (4, 64))

    def gradient(draws, **settings):
        wrapped = CGGRModel(model, selection="random", seed=1, **settings)
        model.zero_grad()
        for _ in range(draws):
            wrapped(input_ids, labels=input_ids).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    full = gradient(1, gradient="exact", min_tokens_ratio=1.0)
    cosines = {
        size: torch.cosine_similarity(gradient(24, min_tokens_ratio=0.25, block_size=size), full, dim=0)
        for size in (1, 8)
    }
    assert cosines[8] > cosines[1] + 0.03
