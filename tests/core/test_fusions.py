"""Fused ops in the layers: recognised on numbers, used where there is a kernel, and the step's numbers stay."""

import types

import pytest
import torch
from torch import nn

import cggr_core.routing.fusions as fusions
from cggr_core import CGGRModel
from cggr_core.elementwise import rotary_reference, silu_mul_reference
from cggr_core.routing import fused_forwards
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB

# Model -> what is recognised in its layers besides norms.
RECOGNISED = {
    "llama": {"rotary", "silu_mul"},
    "mistral-sliding": {"rotary", "silu_mul"},
    "qwen3": {"rotary", "silu_mul"},
    "olmo2": {"rotary", "silu_mul"},
    "mixtral": {"rotary"},
    "gemma": {"rotary"},
    "phi3": {"rotary"},
    "cohere": {"silu_mul"},  # its rotary embedding turns neighbouring pairs
    "gpt2": set(),
    "bloom": set(),
}


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """Counts of calls of stand-ins for the kernels, which are the references under other names."""
    counts = {"rotary": 0, "silu_mul": 0}
    references = {"rotary": rotary_reference, "silu_mul": silu_mul_reference}

    def resolve(op, device_type, dtype=None):
        def kernel(*args):
            counts[op] += 1
            return references[op](*args)

        return kernel

    monkeypatch.setattr(fusions, "resolve", resolve)
    return counts


def tokens() -> torch.Tensor:
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", RECOGNISED)
def test_what_is_recognised_runs_and_changes_no_number(name, calls, monkeypatch):
    model, input_ids = ROUTABLE[name](), tokens()
    settings = {"selection": "random", "gradient": "kv", "engine": "interleaved"}
    CGGRModel(model, **settings).train()(input_ids, labels=input_ids, draw=1).backward()
    found = gradients(model)
    assert {op for op, count in calls.items() if count} == RECOGNISED[name]
    monkeypatch.setattr("cggr_core.routing.probe.fused_forwards", lambda modules: {})
    CGGRModel(model, **settings).train()(input_ids, labels=input_ids, draw=1).backward()
    assert relative_error(found, gradients(model)) <= 1e-5


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_layer_of_every_pass_runs_fused_and_the_model_is_left_as_it_was(engine, checkpointing, calls):
    model, input_ids = ROUTABLE["llama"]().train(), tokens()
    if checkpointing:
        for layer in model.model.layers:
            layer.gradient_checkpointing = True
    wrapped = CGGRModel(model, selection="random", engine=engine).train()
    wrapped(input_ids, labels=input_ids).backward()
    calls.update(rotary=0, silu_mul=0)
    wrapped(input_ids, labels=input_ids).backward()
    layers = len(model.model.layers)
    # Kept and other tokens each, and the kept ones again where layers are recomputed; in the last layer of the
    # interleaved engine, the other tokens stop at their keys and values.
    recomputed = layers if checkpointing else 0
    assert calls["rotary"] == 2 * layers + recomputed
    assert calls["silu_mul"] in (2 * layers + recomputed, 2 * layers + recomputed - 1)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_without_a_kernel_the_models_own_code_runs(monkeypatch):
    model, input_ids = ROUTABLE["llama"](), tokens()
    wanted = model(input_ids=input_ids).logits
    monkeypatch.setattr("torch.nn.functional.rms_norm", None)
    for module, forward in fused_forwards(model.modules()).items():
        if "Norm" not in type(module).__name__:
            module.forward = forward
    assert torch.equal(model(input_ids=input_ids).logits, wanted)


def test_modules_that_somebody_replaced_or_compiled_are_left_as_they_are():
    model = ROUTABLE["llama"]()
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    attention.forward = types.MethodType(type(attention).forward, attention)
    mlp.compile(backend="eager")
    subclass = type("Own", (type(mlp),), {"__module__": "somewhere.else"})
    other = model.model.layers[1].mlp
    other.__class__ = subclass
    assert not {attention, mlp, other} & set(fused_forwards(model.modules()))


def test_a_gated_mlp_of_another_formula_is_left_as_it_is():
    mlp = ROUTABLE["llama"]().model.layers[0].mlp

    class Doubled(type(mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    Doubled.__module__ = "transformers.models.doubled"
    mlp.__class__ = Doubled
    assert fused_forwards([mlp]) == {}
    gelu = ROUTABLE["llama"]().model.layers[0].mlp
    gelu.act_fn = nn.GELU()
    assert fused_forwards([gelu]) == {}


def test_the_module_that_an_attention_is_written_in_is_not_changed(calls):
    model = ROUTABLE["llama"]()
    module = __import__(type(model).__module__, fromlist=["apply_rotary_pos_emb"])
    own = module.apply_rotary_pos_emb
    CGGRModel(model).train()(tokens(), labels=tokens()).backward()
    assert calls["rotary"] > 0
    assert module.apply_rotary_pos_emb is own
