"""Steps that run eagerly: obstacles to recording, and recordings that do not pay off."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from cggr_core import CGGRModel, Selection
from cggr_core.experimental import LearnedRouter
from cggr_core.recording import ledger, recorder, replay
from cggr_core.recording.obstacles import obstacle_of
from tests.support.model_steps import backward, checkpoint_activations, tokens
from tests.support.recorded_steps import (
    ENOUGH,
    batch,
    reason_of,
    record_at_once,
    recorded,
    recording_model,
    replayed,
)
from tests.support.reenacted import Reenacted
from tests.support.tiny_models import ROUTABLE


@pytest.fixture(autouse=True)
def _recorded_at_once(monkeypatch):
    record_at_once(monkeypatch)


def test_what_stands_against_it():
    selection = Selection.from_mask(torch.ones(3, 12, dtype=torch.bool), capacity=4)
    model = recorded()
    assert reason_of(model, selection=selection) == "selection is passed in"
    embeds = model.model.get_input_embeddings()(tokens())
    loss = model(inputs_embeds=embeds, labels=tokens())
    loss.backward()
    assert model._recorder.reason == "the argument inputs_embeds requires gradients"
    with torch.no_grad():
        model(**batch(0))
    assert model._recorder.reason == "gradients are off"
    with torch.autograd.graph.save_on_cpu():
        backward(model, tokens())
    assert "are active" in model._recorder.reason
    backward(model, tokens())
    assert replayed(model)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda base: recording_model(base, warmup_steps=50), "the keep ratio is changing"),
        (lambda base: recording_model(base, dynamic_threshold=True), "the keep ratio is changing"),
    ],
)
def test_settings_that_stand_against_it(make, reason):
    assert reason in reason_of(make(ROUTABLE["llama"]()))


def test_an_fp8_context_keeps_no_copy_that_could_grow_old():
    made = recording_model(ROUTABLE["llama"](), context_precision="fp8")
    assert obstacle_of(made._router) is None


@pytest.mark.parametrize("own", [LearnedRouter(depth=1), lambda **inputs: torch.randn(3, 12, 97)])
def test_routers_that_stand_against_it(own):
    made = CGGRModel(ROUTABLE["llama"](), own)
    assert "may run arbitrary code in a step" in obstacle_of(made._router)


def hook(base):
    base.model.layers[1].register_forward_hook(lambda *args: None)


def offload(base):
    base.model.layers[1]._hf_hook = object()


def checkpoint_reentrantly(base):
    checkpoint_activations(base, use_reentrant=True)


def checkpoint_with_wrappers(base):
    apply_activation_checkpointing(base, check_fn=lambda module: isinstance(module, type(base.model.layers[0])))


@pytest.mark.parametrize(
    ("spoil", "gradient", "reason"),
    [
        (hook, "kv", "a LlamaDecoderLayer has hooks"),
        (offload, "kv", "a LlamaDecoderLayer has hooks"),
        (checkpoint_reentrantly, "exact", "gradient checkpointing restores"),
        (checkpoint_with_wrappers, "sequence", "gradient checkpointing restores"),
    ],
)
def test_models_that_stand_against_it(spoil, gradient, reason):
    base = ROUTABLE["llama"]()
    spoil(base)
    model = recording_model(base, gradient=gradient, selection="random")
    for seed in range(ENOUGH):
        backward(model, tokens(seed=seed))
    assert reason in model._recorder.reason


@pytest.mark.parametrize("gradient", ["kv", "exact"])
def test_checkpointed_layers_with_dropout_are_left_as_they_are(gradient):
    base = ROUTABLE["llama"](attention_dropout=0.3)
    checkpoint_activations(base)
    model = recording_model(base, gradient=gradient, selection="random")
    for seed in range(ENOUGH):
        backward(model, tokens(seed=seed))
    assert "draw random numbers" in model._recorder.reason


def test_a_step_that_waits_for_the_device_is_left_as_it_is_and_said_once(caplog, monkeypatch):
    monkeypatch.setattr(Reenacted, "reads", "the step makes the host wait for the device (moe.py, line 7)")
    with caplog.at_level(logging.INFO, "cggr_core.recording.recorder"):
        model = recording_model(ROUTABLE["llama"](), selection="random")
        for seed in range(ENOUGH + 3):
            backward(model, tokens(seed=seed))
    assert [record.message for record in caplog.records] == [
        "cuda_graph='auto': steps run eagerly, because the step makes the host wait for the device (moe.py, line 7)"
    ]


def test_what_recordings_hold_is_said(caplog):
    with caplog.at_level(logging.INFO, "cggr_core.recording.recorder"):
        recorded()
    assert [record.message for record in caplog.records] == [
        "cuda_graph='auto': recording 1 of at most 16; they hold 0.00 GB together"
    ]


def test_a_recording_that_gives_other_numbers_is_not_used(monkeypatch):
    capture = Reenacted.capture

    def wrong(self, run):
        again, places = capture(self, run)
        return lambda: (again(), places[0].add_(1)), places

    monkeypatch.setattr(Reenacted, "capture", wrong)
    model = recording_model(ROUTABLE["llama"](), selection="random")
    for seed in range(ENOUGH):
        backward(model, tokens(seed=seed))
    assert "gives different numbers" in model._recorder.reason


def test_a_recording_that_saves_nothing_is_not_held(monkeypatch):
    monkeypatch.setattr(recorder, "_WORTH", 0.0)
    model = recording_model(ROUTABLE["llama"](), selection="random")
    for seed in range(ENOUGH):
        backward(model, tokens(seed=seed))
    assert "not bound by launches" in model._recorder.reason
    assert model._recorder.recordings == 0
    assert model._recorder._places is None
    monkeypatch.setattr(recorder, "_WORTH", 1e9)
    for seed in range(ENOUGH):
        backward(model, tokens(length=9, seed=seed))
    assert replayed(model)


@pytest.mark.parametrize(("share", "held"), [(0.89, 1), (0.98, 0)])
def test_what_a_recording_has_to_save(share, held, monkeypatch):
    """The first two readings of the clock are around the step as it is, the next two around a replay."""
    monkeypatch.undo()
    monkeypatch.setattr(ledger, "IN_A_ROW", 1)
    times = iter([0.0, 1.0, 1.0, 1.0 + share])
    monkeypatch.setattr(replay, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    model = recording_model(ROUTABLE["llama"](), selection="random")
    for seed in range(ENOUGH):
        model(**batch(seed)).backward()
    assert model._recorder.recordings == held


def test_a_recording_that_fails_is_not_tried_again(monkeypatch, caplog):
    def fail(self, run):
        run()
        raise RuntimeError("CUDA error: operation not permitted\nand so on")

    monkeypatch.setattr(Reenacted, "capture", fail)
    model, plain = (build(ROUTABLE["llama"](), selection="random") for build in (recording_model, CGGRModel))
    with caplog.at_level(logging.WARNING, "cggr_core.recording.recorder"):
        for seed in range(ENOUGH + 2):
            loss, found = backward(model, tokens(seed=seed))
            expected_loss, expected = backward(plain, tokens(seed=seed))
            torch.testing.assert_close((loss, found), (expected_loss, expected), rtol=0, atol=0)
    assert [record.message for record in caplog.records] == [
        "cuda_graph='auto': steps run eagerly, because recording failed (CUDA error: operation not permitted)"
    ]
