"""Recorded steps on the CPU, where a replay does the pass again: what is recorded, when, and what autograd sees."""

import copy
import logging
import pickle

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from cggr_core import CGGRModel, Selection, create_truncated_router
from cggr_core.experimental import LearnedRouter
from cggr_core.recording import recorder, replay
from cggr_core.recording.model_state import ModelState
from cggr_core.recording.obstacles import obstacle_of
from tests.support.model_steps import backward, checkpoint_activations, tokens
from tests.support.recorded_steps import hold_to_eager, recording_model, replayed, worth_it
from tests.support.tiny_models import ROUTABLE

ENOUGH = 3  # the first step of a model also looks at it


@pytest.fixture(autouse=True)
def kept_whatever_they_save(monkeypatch):
    worth_it(monkeypatch)
    monkeypatch.setattr(recorder, "EAGER_STEPS", 1)


def batch(seed: int, length: int = 12, **more) -> dict:
    input_ids = tokens(length=length, seed=seed)
    return {"input_ids": input_ids, "labels": input_ids, **more}


def recorded(architecture: str = "llama", **settings) -> CGGRModel:
    """A model whose next step of three rows of 12 tokens is a replay."""
    model = recording_model(ROUTABLE[architecture](), **{"selection": "random", **settings})
    for seed in range(ENOUGH):
        backward(model, tokens(seed=seed))
    assert replayed(model)
    return model


def reason_of(model: CGGRModel, **inputs) -> str:
    backward(model, tokens(), **inputs)
    assert not replayed(model)
    return model._recorder.reason


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
    """Draws, first rows, items, weights and masks are read anew; shapes have recordings of their own."""
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
    """Two documents in every row, in another place in each step, and one document alone."""
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
    """A replay draws with the number that is next, and the state says how many there were."""
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
    """The second runs as it is: the first one's activations are still wanted."""
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
    """The one that was not used for longest goes, and comes again after as many steps as any other."""
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


def test_recordings_that_pay_make_room_for_more(monkeypatch):
    monkeypatch.setattr(recorder, "MOST_ATTEMPTS", 1)
    monkeypatch.setattr(recorder, "REPLAYS_THAT_PAY", 5)
    model = recorded()
    for _ in range(ENOUGH):
        backward(model, tokens(length=5))
    assert "still change after 1 recordings" in model._recorder.reason
    for _ in range(5):
        backward(model, tokens())
    backward(model, tokens(length=5))
    assert replayed(model)


def test_a_model_that_keeps_changing_is_left_alone(monkeypatch):
    monkeypatch.setattr(recorder, "MOST_ATTEMPTS", 2)
    model = recorded()
    for _ in range(2):
        change_weights(model)
        for seed in range(ENOUGH):
            backward(model, tokens(seed=seed))
    assert "still change after 2 recordings" in model._recorder.reason


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


@pytest.mark.parametrize("gradient", ["kv", "exact"])
def test_checkpointed_layers_with_dropout_are_left_as_they_are(gradient):
    base = ROUTABLE["llama"](attention_dropout=0.3)
    checkpoint_activations(base)
    model = recording_model(base, gradient=gradient, selection="random")
    for seed in range(ENOUGH):
        backward(model, tokens(seed=seed))
    assert "draw random numbers" in model._recorder.reason


def test_a_step_that_waits_for_the_device_is_left_as_it_is_and_said_once(caplog, monkeypatch):
    from tests.support.reenacted import Reenacted

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
    from tests.support.reenacted import Reenacted

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
    monkeypatch.setattr(replay, "_WORTH", 0.0)
    model = recording_model(ROUTABLE["llama"](), selection="random")
    for seed in range(ENOUGH):
        backward(model, tokens(seed=seed))
    assert "not bound by launches" in model._recorder.reason
    assert model._recorder.recordings == 0
    assert model._recorder._places is None
    monkeypatch.setattr(replay, "_WORTH", 1e9)
    for seed in range(ENOUGH):
        backward(model, tokens(length=9, seed=seed))
    assert replayed(model)


@pytest.mark.parametrize(("share", "held"), [(0.89, 1), (0.98, 0)])
def test_what_a_recording_has_to_save(share, held, monkeypatch):
    """The first two readings of the clock are around the step as it is, the next two around a replay."""
    monkeypatch.undo()
    monkeypatch.setattr(recorder, "EAGER_STEPS", 1)
    times = iter([0.0, 1.0, 1.0, 1.0 + share])
    monkeypatch.setattr(replay.time, "perf_counter", lambda: next(times))
    model = recording_model(ROUTABLE["llama"](), selection="random")
    for seed in range(ENOUGH):
        model(**batch(seed)).backward()
    assert model._recorder.recordings == held


def test_a_recording_that_fails_is_not_tried_again(monkeypatch, caplog):
    from tests.support.reenacted import Reenacted

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


def test_dropout_draws_as_it_would(monkeypatch):
    """The random state after a recording is that after a step; and every replay draws anew."""
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
