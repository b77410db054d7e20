import json
import os
import signal

import numpy as np
import pytest
import torch

from cggr_train.data import Batches
from cggr_train.errors import InputError
from cggr_train.evaluate import heldout_loss
from cggr_train.interrupt import StopRequest
from cggr_train.learner import Routing, StandardLearner, build_learner
from cggr_train.log import JsonlLog, read_log
from cggr_train.loop import Budget, Clock, LearningRate, LoopSettings, Progress, build_optimizer, train_steps
from cggr_train.memory import memory_in_use, peak_memory
from cggr_train.presets import build_config, build_model

CPU = torch.device("cpu")


def fresh_model():
    return build_model(build_config("nano", vocab_size=300, length=32), seed=0)


def batches(batch_size=2):
    stream = np.random.default_rng(0).integers(0, 300, 1000)
    return Batches(stream, length=16, batch_size=batch_size, seed=0)


def settings(**values):
    return LoopSettings(**{"budget": Budget(steps=3), "learning_rate": LearningRate(1e-3), **values})


def run(loop, *, batch_size=2, progress=None, stop=lambda: False):
    model = fresh_model()
    progress = progress or Progress()
    optimizer = build_optimizer(model, weight_decay=0.1)
    seen = []
    train_steps(
        StandardLearner(model), optimizer, batches(batch_size), loop, progress, Clock(CPU),
        on_step=lambda loss, rate: seen.append((loss.item(), rate)), stop=stop,
    )  # fmt: skip
    return model, progress, seen


def test_it_trains_for_the_steps_of_the_budget():
    model, progress, seen = run(settings(budget=Budget(steps=8), learning_rate=LearningRate(1e-2)))
    assert progress.step == len(seen) == 8
    assert progress.tokens == 8 * 2 * 16
    assert progress.seconds > 0
    assert not next(model.parameters()).equal(next(fresh_model().parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_budget_of_seconds_ends_it():
    _, progress, _ = run(settings(budget=Budget(steps=10_000, seconds=0.05)))
    assert 1 <= progress.step < 10_000
    assert progress.seconds >= 0.05


def test_stop_is_asked_before_every_step():
    answers = iter([False, False, True])
    _, progress, seen = run(settings(), stop=lambda: next(answers))
    assert progress.step == len(seen) == 2


def test_accumulated_halves_are_the_whole_batch():
    whole, _, losses = run(settings(clip=None), batch_size=4)
    halves, _, parts = run(settings(clip=None, accumulate=2), batch_size=2)
    for (one, _), (other, _) in zip(losses, parts, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    for one, other in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_budgets():
    assert Budget(steps=10).spent(Progress(step=5)) == 0.5
    assert Budget(seconds=4).spent(Progress(step=5, seconds=1)) == 0.25
    assert Budget(steps=10, seconds=4).spent(Progress(step=5, seconds=1)) == 0.5
    with pytest.raises(InputError, match="give --steps, --seconds or both"):
        Budget()
    with pytest.raises(InputError, match="--steps must be positive, got 0"):
        Budget(steps=0)


def test_learning_rate():
    rate = LearningRate(1.0, warmup=0.1, final=0.2)
    assert rate.at(0) == pytest.approx(0.02)
    assert rate.at(0.05) == pytest.approx(0.5)
    assert rate.at(0.1) == pytest.approx(1.0)
    assert rate.at(0.55) == pytest.approx(0.6)
    assert rate.at(1.0) == rate.at(1.5) == pytest.approx(0.2)


def test_weight_decay_on_matrices_alone():
    decayed, others = build_optimizer(fresh_model(), weight_decay=0.1).param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert {parameter.dim() for parameter in decayed["params"]} == {2}
    assert {parameter.dim() for parameter in others["params"]} == {1}


def test_the_clock_stands_still_while_paused(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cggr_train.loop.time.perf_counter", lambda: now[0])
    clock = Clock(CPU, elapsed=10)
    now[0] = 2
    with clock.paused():
        now[0] = 50
    now[0] = 53
    assert clock.seconds == 15


def test_unknown_method():
    with pytest.raises(InputError, match="--method must be one of cggr, random, standard, got 'best'"):
        build_learner(fresh_model(), "best", Routing(), seed=0)


def test_heldout_loss_is_the_mean_over_all_predicted_tokens():
    model = fresh_model().train()
    tokens = torch.randint(0, 300, (3, 16), generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=tokens).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 300), tokens[:, 1:].reshape(-1))
    assert heldout_loss(model, [tokens[:2], tokens[2:]], device=CPU) == pytest.approx(expected.item(), abs=1e-6)
    assert model.training
    with pytest.raises(ValueError, match="no token to predict"):
        heldout_loss(model, [], device=CPU)


def test_the_first_signal_asks_and_the_second_is_the_systems_own(capfd):
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        assert stop.exit_code == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == before
    assert "press Ctrl-C again to stop at once" in capfd.readouterr().err


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_asks_once_and_is_told_nothing(capfd):
    told = []
    with StopRequest(on_hangup=lambda: told.append("gone")) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.exit_code == 129
    assert told == ["gone"]
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_under_nohup_a_closed_terminal_is_no_request():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_memory_is_that_of_this_process():
    before = memory_in_use(CPU)
    block = torch.ones(40_000_000)
    assert memory_in_use(CPU) - before > 100_000_000
    assert peak_memory(CPU) >= memory_in_use(CPU)
    del block


def test_the_log_forgets_what_a_resumed_run_repeats(tmp_path):
    path = tmp_path / "log.jsonl"
    log = JsonlLog(path)
    log.write(event="start")
    for step in (1, 2, 3):
        log.write(step=step, loss=float("nan") if step == 2 else 1.0)
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [record.get("step") for record in read_log(path)] == [None, 1, 2, 3]
    JsonlLog(path, keep_until_step=2).write(step=3, loss=2.0)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"event": "start"},
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 2.0},
    ]
