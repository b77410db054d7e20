"""torch's RMS norm replaces a model's only if it is the same function, and only in the passes."""

import types

import pytest
import torch
from torch import nn

from cggr_core import CGGRModel
from cggr_core.routing.norms import fused_norms
from tests.support.model_steps import checkpoint_activations
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB


def norms_of(name: str) -> list[nn.Module]:
    return [module for module in ROUTABLE[name]().modules() if type(module).__name__.endswith("Norm")]


@pytest.mark.parametrize(
    "name", ["llama", "mistral-sliding", "qwen3", "phi3", "olmo2", "granite", "mixtral", "gpt-oss"]
)
def test_every_norm_of_these_is_the_same_function(name):
    norms = norms_of(name)
    assert norms
    assert set(fused_norms(norms)) == set(norms)


@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "gpt2", "cohere", "stablelm", "bert-masked"])
def test_norms_of_another_formula_are_left_as_they_are(name):
    norms = norms_of(name)
    assert norms
    assert fused_norms(norms) == {}


def llama_norm() -> nn.Module:
    norm = norms_of("llama")[0]
    norm.weight.data.copy_(torch.randn(norm.weight.shape, generator=torch.Generator().manual_seed(1)))
    return norm


def test_norms_that_somebody_else_replaced_or_compiled_are_left_as_they_are():
    replaced, compiled, buffered = (llama_norm() for _ in range(3))
    replaced.forward = types.MethodType(lambda self, x: x, replaced)
    compiled.compile(backend="eager")
    buffered.register_buffer("shift", torch.zeros(1))
    assert fused_norms([replaced, compiled, buffered]) == {}


class FakeRMSNorm(nn.Module):
    """As transformers writes them; what is beside it differs in one thing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, generator=torch.Generator().manual_seed(4)))
        self.register_parameter("bias", None)
        self.eps = 1e-6

    def normed(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self.weight * self.normed(x)


class RMSNormWithItsEpsilonOutside(FakeRMSNorm):
    def normed(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)


class EpsilonElsewhereRMSNorm(FakeRMSNorm):
    def normed(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 2 * self.eps)


class CentredRMSNorm(FakeRMSNorm):
    def normed(self, x):
        return super().normed(x - x.mean(-1, keepdim=True))


class SlightlyLargerRMSNorm(FakeRMSNorm):
    def forward(self, x):
        return 1.0005 * super().forward(x)


class OneMoreRMSNorm(FakeRMSNorm):
    def forward(self, x):
        return (1 + self.weight) * self.normed(x)


class BiasedRMSNorm(FakeRMSNorm):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return super().forward(x) + self.bias


class ShiftedRMSNorm(FakeRMSNorm):
    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.zeros(8))

    def forward(self, x):
        return super().forward(x) + self.shift


class AdaptedRMSNorm(FakeRMSNorm):
    def __init__(self):
        super().__init__()
        self.adapter = nn.Linear(8, 8)
        nn.init.zeros_(self.adapter.weight)
        nn.init.zeros_(self.adapter.bias)

    def forward(self, x):
        return super().forward(x) + self.adapter(x)


class GatedRMSNorm(FakeRMSNorm):
    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * gate)


def fake_norm(kind: type[FakeRMSNorm], home: str = "transformers.models.fake", name: str = "FakeRMSNorm") -> nn.Module:
    return type(name, (kind,), {"__module__": home})()


def test_a_norm_that_is_written_as_transformers_does_is_recognised_among_others():
    norm, other = fake_norm(FakeRMSNorm), fake_norm(CentredRMSNorm)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(5)) / 1000  # the epsilon counts
    found = fused_norms([nn.Linear(8, 8), other, norm])
    assert set(found) == {norm}
    torch.testing.assert_close(found[norm](x), norm(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "kind",
    [
        RMSNormWithItsEpsilonOutside,
        EpsilonElsewhereRMSNorm,
        CentredRMSNorm,
        SlightlyLargerRMSNorm,
        OneMoreRMSNorm,
        BiasedRMSNorm,
        ShiftedRMSNorm,
        AdaptedRMSNorm,
        GatedRMSNorm,
    ],
)
def test_what_differs_in_one_thing_is_left_as_it_is(kind):
    assert fused_norms([fake_norm(kind)]) == {}


@pytest.mark.parametrize(("home", "name"), [("transformers_modules.own", "FakeRMSNorm"), ("transformers.own", "Norm")])
def test_classes_of_others_and_of_other_names_are_left_as_they_are(home, name):
    assert fused_norms([fake_norm(FakeRMSNorm, home, name)]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_at_least_as_exact_as_the_models_own(dtype):
    norm = llama_norm().to(dtype)
    x = torch.randn(5, 7, norm.weight.numel(), generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    x = x.to(dtype)
    truth = nn.functional.rms_norm(x.double(), norm.weight.shape, norm.weight.double(), norm.variance_epsilon)
    own = (norm(x).double() - truth).norm() / truth.norm()
    found = fused_norms([norm])[norm](x)
    assert found.dtype == dtype
    assert (found.double() - truth).norm() / truth.norm() <= own + 1e-8


@pytest.mark.parametrize(("rows", "weight"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_other_dtypes_go_the_models_own_way(rows, weight):
    norm = llama_norm().to(weight)
    x = torch.randn(3, norm.weight.numel(), generator=torch.Generator().manual_seed(3)).to(rows)
    found, wanted = fused_norms([norm])[norm](x), norm(x)
    assert found.dtype == wanted.dtype
    assert found.equal(wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
def test_the_passes_run_it_and_leave_the_model_as_it_was(engine, checkpointing, monkeypatch):
    model = ROUTABLE["qwen3"]()
    if checkpointing:
        checkpoint_activations(model)
    input_ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    calls = []
    kind = type(model.model.norm)
    before = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: calls.append(self) or before(self, x))
    fused = CGGRModel(model, engine=engine, selection="random").train()
    with monkeypatch.context() as patch:
        patch.setattr("cggr_core.routing.probe.fused_forwards", lambda modules: {})
        own = CGGRModel(model, engine=engine, selection="random").train()
        own(input_ids, labels=input_ids, draw=0)  # the first two forwards look at a model with code of others
    fused(input_ids, labels=input_ids, draw=0)

    def step(wrapped: CGGRModel):
        wrapped(input_ids, labels=input_ids, draw=0)
        model.zero_grad(set_to_none=True)
        calls.clear()
        loss = wrapped(input_ids, labels=input_ids, draw=0)
        loss.backward()
        return loss.detach(), gradients(model), len(calls)

    own_loss, own_gradients, own_calls = step(own)
    loss, grads, fused_calls = step(fused)
    assert own_calls > 0
    assert fused_calls == 0
    torch.testing.assert_close(loss, own_loss, rtol=1e-6, atol=0)
    assert relative_error(grads, own_gradients) <= 1e-6
    assert not any("forward" in module.__dict__ for module in model.modules())
