"""The standard learner is Hugging Face's own training, with the norms that the routed passes have too."""

import copy

import torch

import cggr_core.routing.norms
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
    monkeypatch.setattr(cggr_core.routing.norms, "rms_norm", noting)
    loss = learner.loss(torch.randint(0, 97, (3, 24), generator=torch.Generator().manual_seed(2)))
    layers = model.config.num_hidden_layers
    assert len(calls) == 2 * layers + 1
    loss.backward()
    assert len(calls) == 4 * layers + 1
