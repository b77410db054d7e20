"""Recorded training steps on a GPU: the losses, selections and weights of eager steps, batch by batch."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import cggr_core.step.selecting
from cggr_train.data import Batches
from cggr_train.learner import Routing, build_learner
from cggr_train.loop import Budget, Clock, LearningRate, LoopSettings, Progress, build_optimizer, train_steps
from cggr_train.presets import build_config, build_model
from cggr_train.recorded import EAGER_STEPS
from cggr_train.run import resume_run, start_run
from cggr_train.settings import TrainSettings

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True")]

STEPS = EAGER_STEPS + 5
LEARNERS = {
    "standard": ("standard", Routing()),
    "kv, two passes": ("cggr", Routing("kv")),
    "kv, truncated router": ("cggr", Routing("kv", router_depth=1)),
    "kv, learned router": ("cggr", Routing("kv", selection="sampled", router="learned")),
    "kv, topk": ("cggr", Routing("kv", selection="topk")),
    "kv, sequence_aware": ("cggr", Routing("kv", selection="sequence_aware")),
    "kv, random": ("random", Routing("kv")),
    "detached, two passes": ("cggr", Routing("detached", selection="sampled")),
    "exact": ("cggr", Routing("exact", selection="sampled")),
    "exact, random": ("random", Routing("exact")),
    "sequence": ("cggr", Routing("sequence", 0.5)),
}


def trained(monkeypatch, name, *, recorded, bfloat16, accumulate=1, sgd=False):
    """Losses, kept positions and last weights of some steps, at a learning rate that moves."""
    method, routing = LEARNERS[name]
    model = build_model(build_config("nano", vocab_size=512, length=64), seed=0).cuda()
    learner = build_learner(model, method, routing, seed=3, cuda_graph="auto" if recorded == "auto" else False)
    optimizer = build_optimizer(model, weight_decay=0.1, capturable=True)
    if sgd:
        optimizer = torch.optim.SGD(model.parameters())
    stream = np.random.default_rng(0).integers(0, 512, 64 * 40)
    rate = LearningRate(0.3 if sgd else 3e-3)
    settings = LoopSettings(Budget(STEPS), rate, accumulate, bfloat16=bfloat16, cuda_graph=recorded)
    made, losses, indices = [], [], []
    select = cggr_core.step.selecting.select

    def remembered(*arguments, **options):
        made.append(select(*arguments, **options))
        return made[-1]

    def on_step(loss, rate):
        losses.append(loss)
        # a replay writes into the tensors of the recording
        indices.append([] if not made else made[-1].index.tolist())

    with monkeypatch.context() as patch:
        patch.setattr(cggr_core.step.selecting, "select", remembered)
        train_steps(
            learner, optimizer, Batches(stream, length=64, batch_size=4, seed=0), settings, Progress(),
            Clock(torch.device("cuda")), on_step=on_step,
        )  # fmt: skip
    kept = learner.metrics["kept_tokens"]
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return torch.stack(losses), indices, weights, int(kept), len(made), learner.replayed


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", LEARNERS)
def test_steps_that_capture_their_passes_are_the_steps(monkeypatch, name, accumulate):
    """Those of a learned router are left as they are. AdamW would make whole steps of what a sum's order changes."""
    given = {"bfloat16": False, "accumulate": accumulate, "sgd": True}
    losses, _, weights, kept, *_ = trained(monkeypatch, name, recorded=False, **given)
    again, _, others, as_many, _, replayed = trained(monkeypatch, name, recorded="auto", **given)
    torch.testing.assert_close(again, losses, rtol=1e-5, atol=0)
    assert (weights - others).norm() <= 1e-5 * weights.norm()
    assert as_many == kept
    assert replayed == (name != "kv, learned router")


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("name", LEARNERS)
def test_recorded_steps_are_the_steps(monkeypatch, name, bfloat16):
    losses, indices, weights, kept, *_ = trained(monkeypatch, name, recorded=False, bfloat16=bfloat16)
    again, same, others, as_many, made, _ = trained(monkeypatch, name, recorded=True, bfloat16=bfloat16)
    torch.testing.assert_close(again, losses, rtol=1e-3 if bfloat16 else 1e-5, atol=0)
    assert same == indices
    assert (weights - others).norm() <= (1e-3 if bfloat16 else 1e-5) * weights.norm()
    assert as_many == kept
    if name != "standard":
        assert made == EAGER_STEPS + 1, "later steps were replayed"
    if name not in ("standard", "kv, topk", "kv, sequence_aware"):
        # of four rows two are kept: there are few ways
        assert len({str(index) for index in same}) >= (2 if name == "sequence" else STEPS), "every replay draws anew"


@pytest.mark.parametrize("name", ["standard", "exact", "kv, two passes"])
def test_a_recorded_step_attends_to_all_tokens_without_a_mask(monkeypatch, name):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # which takes none
        trained(monkeypatch, name, recorded=True, bfloat16=True)


def test_all_batches_of_an_accumulated_step_are_recorded(monkeypatch):
    losses, _, weights, *_ = trained(monkeypatch, "kv, two passes", recorded=False, bfloat16=False, accumulate=2)
    again, _, others, *_ = trained(monkeypatch, "kv, two passes", recorded=True, bfloat16=False, accumulate=2)
    torch.testing.assert_close(again, losses, rtol=1e-5, atol=0)
    assert (weights - others).norm() <= 1e-5 * weights.norm()


def test_a_recorded_run_is_resumed_where_it_was(tmp_path):
    import io

    from rich.console import Console

    data = tmp_path / "data.txt"
    data.write_text("".join(f"def function_{n}(a, b):\n    return a * {n} + b ** {n % 7}\n\n" for n in range(400)))
    console = Console(file=io.StringIO())
    given = TrainSettings(
        data=(str(data),), config="nano", vocab_size=300, length=32, batch_size=4, steps=16, lr_warmup=0.5,
        eval_sequences=8, cuda_graph=True,
    )  # fmt: skip
    whole = start_run(given, tmp_path / "whole", console)
    assert whole.progress.step == 16
    start_run(dataclasses.replace(given, save_every=8), tmp_path / "parts", console)
    (tmp_path / "parts" / "checkpoints" / "step-00000016").rename(tmp_path / "gone")
    resumed = resume_run(tmp_path / "parts", console)
    assert resumed.progress.step == 16
    assert resumed.heldout_loss == pytest.approx(whole.heldout_loss, rel=1e-4)
