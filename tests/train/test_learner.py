"""Learners differ only in their routing: layers, loss and optimizer are the same code in all of them."""

import copy

import pytest
import torch
from transformers.loss.loss_utils import LOSS_MAPPING

import cggr_core.readout
import cggr_core.routing.norms
from cggr_train.data.supervision import unsupervised
from cggr_train.learner import Routing, build_learner
from cggr_train.presets import build_config, build_model
from tests.support.model_steps import checkpoint_activations


def test_the_standard_learner_is_the_models_own_loss_and_gradient_with_fused_norms(monkeypatch):
    model = build_model(build_config("nano", vocab_size=97, length=24), seed=0)
    with torch.no_grad():  # all ones would hide a norm without its weight
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    own = copy.deepcopy(model)
    input_ids = torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(2))
    fused, calls = cggr_core.routing.norms.rms_norm, []

    def noting(hidden, *arguments):
        calls.append(hidden.shape)
        return fused(hidden, *arguments)

    learner = build_learner(model, "standard", Routing(), seed=0)
    learner.loss(input_ids)  # looks at the model too
    monkeypatch.setattr(cggr_core.routing.norms, "rms_norm", noting)
    loss = learner.loss(input_ids)
    loss.backward()
    assert len(calls) == 2 * model.config.num_hidden_layers + 1
    expected = own(input_ids, labels=input_ids, use_cache=False).loss
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for (name, found), wanted in zip(model.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-7, msg=name)
    calls.clear()
    model(input_ids)
    assert not calls, "outside of its step the model is as it was"


def test_a_checkpointed_standard_learner_keeps_its_fused_norms_in_the_backward_pass(monkeypatch):
    """Layers are run again there, after the end of any block of the forward pass."""
    model = build_model(build_config("nano", vocab_size=97, length=24), seed=0)
    checkpoint_activations(model.train())
    fused, calls = cggr_core.routing.norms.rms_norm, []

    def noting(hidden, *arguments):
        calls.append(hidden.shape)
        return fused(hidden, *arguments)

    learner = build_learner(model, "standard", Routing(), seed=0)
    input_ids = torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(2))
    learner.loss(input_ids)  # looks at the model too
    monkeypatch.setattr(cggr_core.routing.norms, "rms_norm", noting)
    loss = learner.loss(input_ids)
    layers = model.config.num_hidden_layers
    assert len(calls) == 2 * layers + 1
    loss.backward()
    assert len(calls) == 4 * layers + 1


LEARNERS = {
    "standard": ("standard", Routing()),
    "supervised, kv": ("cggr", Routing("kv", selection="supervised")),
    "random, kv": ("random", Routing("kv")),
    "sampled, kv, two passes": ("cggr", Routing("kv", selection="sampled")),
    "sampled, detached, truncated router": ("cggr", Routing("detached", selection="sampled", router_depth=1)),
    "sampled, exact": ("cggr", Routing("exact", selection="sampled")),
    "topk, sequence": ("cggr", Routing("sequence", 0.5, selection="topk")),
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_runs_the_same_layers_and_the_same_loss(monkeypatch, name, checkpointed):
    model = build_model(build_config("nano", vocab_size=97, length=24), seed=0).train()
    if checkpointed:
        checkpoint_activations(model)
    method, routing = LEARNERS[name]
    learner = build_learner(model, method, routing, seed=0, labelled=True)
    rows = torch.randint(0, 97, (4, 24), generator=torch.Generator().manual_seed(2))
    rows[:, :12] = unsupervised(rows[:, :12])
    learner.loss(rows)  # looks at the model too
    called = {"plain norm": 0, "fused norm": 0, "own loss": 0, "fused loss": 0}

    def counting(key, function):
        def call(*arguments, **options):
            called[key] += 1
            return function(*arguments, **options)

        return call

    kind = type(model.model.norm)
    monkeypatch.setattr(kind, "forward", counting("plain norm", kind.forward))
    monkeypatch.setitem(LOSS_MAPPING, "ForCausalLM", counting("own loss", LOSS_MAPPING["ForCausalLM"]))
    for module, op, key in (
        (cggr_core.routing.norms, "rms_norm", "fused norm"),
        (cggr_core.readout, "linear_cross_entropy", "fused loss"),
    ):
        monkeypatch.setattr(module, op, counting(key, getattr(module, op)))
    for _ in range(2):  # what was changed about the model is seen, and looked at twice as code of others
        learner.loss(rows)
    called.update(dict.fromkeys(called, 0))
    learner.loss(rows).backward()
    assert called["plain norm"] == called["own loss"] == 0
    assert called["fused loss"] == 1
    assert called["fused norm"] >= 2 * model.config.num_hidden_layers + 1
