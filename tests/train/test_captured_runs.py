"""Runs whose methods capture their passes automatically; on the CPU a replay runs the pass again."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cggr_train.data import TokenStore
from cggr_train.errors import InputError
from cggr_train.learner import Routing
from cggr_train.loop import Budget, LearningRate, LoopSettings
from cggr_train.presets import build_config, build_model
from cggr_train.report.study_page import captured_steps
from cggr_train.session import RunSession, SessionSettings
from cggr_train.settings import TrainSettings
from cggr_train.study.arms import plan_arms
from cggr_train.study.context import graph_of_steps
from cggr_train.study.settings import StudySettings
from tests.support.recorded_steps import record_at_once, record_by_doing_again

LENGTH, VOCAB, STEPS = 16, 257, 6


@pytest.fixture(autouse=True)
def _recorded_at_once(monkeypatch):
    record_at_once(monkeypatch)


def token_store(*, labelled: bool) -> TokenStore:
    tokens = np.random.default_rng(0).integers(0, VOCAB, LENGTH * 60)
    if labelled:  # the first ten tokens of every row are a prompt, marked by the complement
        tokens.reshape(-1, LENGTH)[:, :10] = ~tokens.reshape(-1, LENGTH)[:, :10]
        store = tokens.astype(np.int32)
    else:
        store = tokens.astype(np.uint16)
    return TokenStore(train=store[: LENGTH * 50], heldout=store[LENGTH * 50 :], documents=1, skipped=0)


def trained(method, routing, *, captured, labelled=False, accumulate=1, bfloat16=False, checkpointing=False):
    """Losses, last weights, held-out losses, and which steps were replayed."""
    loop = LoopSettings(
        Budget(STEPS), LearningRate(3e-3), accumulate, bfloat16=bfloat16, cuda_graph="auto" if captured else False
    )
    settings = SessionSettings(
        method, routing, length=LENGTH, batch_size=4, seed=3, weight_decay=0.1, loop=loop, checkpointing=checkpointing
    )
    model = build_model(build_config("nano", vocab_size=VOCAB, length=LENGTH), seed=0)
    session = RunSession(settings, model, token_store(labelled=labelled), torch.device("cpu"))
    if captured:
        record_by_doing_again(session.learner.routed)
    losses, replayed, heldout = [], [], []

    def on_step(loss, rate):
        losses.append(loss)
        replayed.append(session.learner.replayed)
        if session.progress.step == 4:
            heldout.append(session.evaluate())

    session.train(on_step)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return torch.stack(losses), weights, heldout, replayed


@pytest.mark.parametrize(
    ("method", "routing", "options"),
    [
        ("standard", Routing(), {"accumulate": 2}),
        ("standard", Routing(), {"labelled": True, "bfloat16": True}),
        ("standard", Routing(), {"checkpointing": True}),
        ("random", Routing("kv", 0.5), {"bfloat16": True}),
        ("cggr", Routing("kv", 0.5, "sampled", "gradnorm"), {"accumulate": 2}),
        ("cggr", Routing("kv", 0.5, router_depth=1), {"checkpointing": True}),
        ("cggr", Routing("kv", selection="supervised"), {"labelled": True, "accumulate": 2}),
        ("cggr", Routing("exact", 0.5, "sampled"), {"checkpointing": True}),
        ("cggr", Routing("sequence", 0.5), {}),
    ],
)
def test_captured_runs_are_the_runs(method, routing, options):
    losses, weights, heldout, eager = trained(method, routing, captured=False, **options)
    again, same, held, replayed = trained(method, routing, captured=True, **options)
    assert not any(eager)
    assert replayed[-3:] == [True] * 3
    torch.testing.assert_close(again, losses, rtol=1e-6, atol=0)
    assert (weights - same).norm() <= 1e-6 * weights.norm()
    assert held == pytest.approx(heldout, rel=1e-6)


@pytest.mark.parametrize(
    ("asked", "router"), list(itertools.product(("auto", True, False), (None, "learned", "remembered")))
)
def test_a_study_captures_every_arm_or_none(asked, router):
    train = TrainSettings(data=("text.txt",), config="nano", steps=1, cuda_graph=asked)
    arms = plan_arms(
        Routing(), gradients=["kv"], ratios=[0.25], selections=["sampled"], scorings=["loss"], batch_size=8,
        routers=[router] if router else (), controls=("equal_cost", "checkpointed"), num_layers=4,
    )  # fmt: skip
    expected = False if asked == "auto" and router is not None else asked
    assert graph_of_steps(StudySettings(train), arms) == expected


def test_what_is_captured_is_one_of_three_things():
    with pytest.raises(InputError, match="cuda_graph must be True, False or 'auto', got 'always'"):
        TrainSettings(data=("text.txt",), config="nano", steps=1, cuda_graph="always")


@pytest.mark.parametrize(
    ("cuda_graph", "replayed", "said"),
    [
        (True, (), "Every arm's optimizer step was captured"),
        (False, (), ""),
        ("auto", (), ""),
        ("auto", (0, 1), "passes of every arm were captured"),
        ("auto", (1,), "passes of some arms were captured and replayed as CUDA graphs: standard, batch 4. "),
    ],
)
def test_the_page_says_which_arms_were_captured(cuda_graph, replayed, said):
    arms = plan_arms(
        Routing(), gradients=["kv"], ratios=[0.25], selections=["random"], scorings=["loss"], batch_size=8, num_layers=4
    )[:2]
    found = {arm.name: number in replayed for number, arm in enumerate(arms)}
    sentence = captured_steps(cuda_graph, SimpleNamespace(arms=arms, replayed=found))
    assert sentence.startswith(said) if said.startswith("Every") else said in sentence
    assert bool(sentence) == bool(said)
