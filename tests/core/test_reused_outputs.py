"""Steps that reuse the context pass's outputs of linear layers: the same numbers from fewer products."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cggr_core import CGGRModel, create_truncated_router
from cggr_core.routing import outputs
from cggr_core.routing.architectures import describe
from cggr_core.routing.rows import Places
from tests.support.exact_steps import A_FEW, aligned, assert_equal, partly_labelled, random_selection, reference
from tests.support.model_steps import backward, checkpoint_activations, tokens
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE

REUSING = {"reuse_outputs": True, "engine": "two_pass"}


@pytest.fixture
def reused(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the outputs that were not computed again."""
    seen: list[tuple[int, ...]] = []
    own = outputs._Linear.forward

    def note(ctx, x, weight, bias, made):
        seen.append(tuple(made.shape))
        return own(ctx, x, weight, bias, made)

    monkeypatch.setattr(outputs._Linear, "forward", note)
    return seen


@pytest.mark.parametrize("gradient", ["kv", "detached"])
@pytest.mark.parametrize("name", ROUTABLE)
def test_equals_the_autograd_reference(name, gradient):
    """Some slots hold no kept token, and rows keep different numbers of them."""
    model, (input_ids, labels) = ROUTABLE[name](), partly_labelled()
    selection = random_selection(aligned(model, labels).countable)
    wrapped = CGGRModel(model, gradient=gradient, selection="random", **REUSING)
    loss = wrapped(input_ids, labels=labels, selection=selection)
    loss.backward()
    found = loss.detach(), gradients(model)
    assert_equal(found, reference(model, labels, selection, gradient=gradient, input_ids=input_ids))


@pytest.mark.parametrize(("gradient", "of_a_layer"), [("kv", 5), ("detached", 7)])
def test_kept_tokens_are_not_multiplied_again(gradient, of_a_layer, reused):
    """In ``kv``, keys and values are: the first pass needs their gradients."""
    model, input_ids = ROUTABLE["llama"](), tokens()
    own = backward(CGGRModel(model, gradient=gradient), input_ids, draw=0)
    assert not reused
    wrapped = CGGRModel(model, gradient=gradient, reuse_outputs=True)
    backward(wrapped, input_ids, draw=0)
    reused.clear()
    assert_equal(backward(wrapped, input_ids, draw=0), own)
    kept = wrapped(input_ids, labels=input_ids, draw=0) is not None and wrapped.metrics["kept_tokens"]
    assert len(reused) == 2 * of_a_layer * len(model.model.layers)
    assert {shape[0] * shape[1] for shape in reused} == {int(kept)}


def test_a_truncated_routers_layers_are_reused_alone(reused):
    model, input_ids = ROUTABLE["llama"](), tokens()
    made = []
    for reuse in (False, True):
        reused.clear()
        wrapped = CGGRModel(model, create_truncated_router(model, 1), reuse_outputs=reuse)
        backward(wrapped, input_ids, draw=0)
        reused.clear()
        made.append(backward(wrapped, input_ids, draw=0))
        assert len(reused) == (5 if reuse else 0)
    assert_equal(*made)


@pytest.mark.parametrize("name", A_FEW)
def test_under_autocast(name, reused):
    model, input_ids = ROUTABLE[name](), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        (own, wanted), (loss, grads) = (
            backward(CGGRModel(model, reuse_outputs=reuse), input_ids, draw=0) for reuse in (False, True)
        )
    assert reused
    torch.testing.assert_close(loss, own, rtol=2e-3, atol=0)
    assert relative_error(grads, wanted) < 0.02


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters(reused):
    model = get_peft_model(ROUTABLE["llama"](), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    input_ids = tokens()
    own, found = (backward(CGGRModel(model, reuse_outputs=reuse), input_ids, draw=0) for reuse in (False, True))
    assert reused
    assert_equal(found, own)


class Scaled(nn.Module):
    """Changes what a linear layer made, in place."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x):
        return self.activation(x.mul_(1.5))


def test_what_is_changed_in_place_is_computed_again(reused):
    model, input_ids = ROUTABLE["llama"](), tokens()
    for layer in model.model.layers:
        layer.mlp.act_fn = Scaled(layer.mlp.act_fn)
    own, found = (backward(CGGRModel(model, reuse_outputs=reuse), input_ids, draw=0) for reuse in (False, True))
    of_the_mlp = [shape for shape in reused if shape[2] == model.config.intermediate_size]
    assert len(of_the_mlp) == len(model.model.layers), "the other of its two inner layers"
    assert_equal(found, own)


def test_a_layer_that_runs_twice_is_computed_again(reused):
    model, input_ids = ROUTABLE["llama"](), tokens()
    for layer in model.model.layers:
        layer.mlp.up_proj = layer.mlp.gate_proj
    own, found = (backward(CGGRModel(model, reuse_outputs=reuse), input_ids, draw=0) for reuse in (False, True))
    assert reused
    assert_equal(found, own)


def test_nothing_is_held_after_a_step():
    model, input_ids = ROUTABLE["llama"](), tokens()
    wrapped = CGGRModel(model, reuse_outputs=True)
    held = []
    own = outputs.ReusableOutputs.of_a_pass

    class Held(outputs.ReusableOutputs):
        def of_a_pass(self, depth):
            held.append(own(self, depth))
            return held[-1]

    wrapped._passes._outputs = Held(model, wrapped._passes.architecture)
    loss = wrapped(input_ids, labels=input_ids)
    assert held and not held[-1]._made, "every layer released its own"
    loss.backward()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_refusals():
    input_ids = tokens()
    for settings, said in (
        ({"gradient": "exact"}, "applies to gradient='kv' and 'detached', but gradient is 'exact'"),
        ({"context_precision": "fp8"}, "would give kept tokens the context's outputs in fp8"),
        ({"selection": "random"}, ".*but selection='random' needs one pass"),
    ):
        with pytest.raises(ValueError, match=f"reuse_outputs=True {said}"):
            CGGRModel(ROUTABLE["llama"](), reuse_outputs=True, **settings)
    with pytest.raises(TypeError, match="reuse_outputs must be"):
        CGGRModel(ROUTABLE["llama"](), reuse_outputs=1)
    model = ROUTABLE["llama"]()
    checkpoint_activations(model)
    with pytest.raises(ValueError, match="gradient checkpointing is on"):
        CGGRModel(model.train(), reuse_outputs=True)(input_ids, labels=input_ids)
    for name in ("attention_dropout", "p"):
        model = ROUTABLE["llama"]().train()
        layer = model.model.layers[0]
        if name == "p":
            layer.dropout = nn.Dropout(0.1)
        else:
            layer.self_attn.attention_dropout = 0.1
        wrapped = CGGRModel(model, reuse_outputs=True)
        with pytest.raises(ValueError, match="trained with dropout"):
            wrapped(input_ids, labels=input_ids)
        layer.self_attn.attention_dropout = 0.0
        layer.dropout = nn.Dropout(0.0)
        assert wrapped(input_ids, labels=input_ids).isfinite()


def test_rates_that_draw_nothing_are_no_obstacle(monkeypatch):
    """In evaluation mode, of heads that a language model does not have, or of what is no number."""
    model = ROUTABLE["llama"]().train()
    model.config.summary_first_dropout = model.config.classifier_dropout = 0.1
    layer = model.model.layers[0]
    layer.p, layer.self_attn.dropout_kind = 0.5, "none"  # only a dropout layer's p is a rate
    layer.dropout = nn.Dropout(0.1).eval()
    reusable = outputs.ReusableOutputs(model, describe(model))
    held = reusable.of_a_pass(2).recording()
    assert set(held) == {part for each in model.model.layers[:2] for part in each.modules() if type(part) is nn.Linear}
    layer.dropout.train()
    with pytest.raises(ValueError, match="trained with dropout, which each draws for itself; set its rates to 0"):
        reusable.of_a_pass(2)
    layer.dropout.eval()
    layer.jitter_noise = 0.1
    with pytest.raises(ValueError, match="trained with dropout"):
        outputs.ReusableOutputs(model, describe(model)).of_a_pass(2)
    del layer.jitter_noise
    model.config.resid_pdrop = 0.1  # which a layer may read when it runs
    with pytest.raises(ValueError, match="trained with dropout"):
        outputs.ReusableOutputs(model, describe(model)).of_a_pass(2)
    monkeypatch.setattr(outputs, "shards_layers", lambda layers: True)
    with pytest.raises(ValueError, match="does not work with layers that FSDP2 shards; leave reuse_outputs=False"):
        reusable.of_a_pass(2)
    monkeypatch.undo()
    checkpoint_activations(model)
    with pytest.raises(ValueError, match="but gradient checkpointing is on, which releases them; switch one"):
        reusable.of_a_pass(2)


INDEX = torch.tensor([[0, 3], [4, 1]])


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("frozen", ["", "weight", "bias", "x", "no bias"])
def test_a_linear_layer_whose_output_is_known_has_its_gradients(frozen):
    def step(known):
        linear = nn.Linear(6, 5, bias=frozen != "no bias")
        with torch.no_grad():
            for seed, parameter in enumerate(linear.parameters()):
                parameter.copy_(numbers(*parameter.shape, seed=seed))
        x = numbers(2, 5, 6, seed=7).requires_grad_(frozen != "x")
        if frozen in ("weight", "bias"):
            getattr(linear, frozen).requires_grad_(False)
        places = Places(INDEX, 5)
        kept = x.gather(1, INDEX[:, :, None].expand(-1, -1, 6))
        held = outputs.PassOutputs([(linear, False)])
        with torch.no_grad():
            held.recording()[linear](x.detach())
        out = held.reusing(places)[linear](kept) if known else linear(kept)
        (out * numbers(2, 2, 5, seed=9)).sum().backward()
        return [out.detach(), x.grad, *(parameter.grad for parameter in linear.parameters())]

    for found, wanted in zip(step(True), step(False), strict=True):
        assert (found is None) is (wanted is None)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("queries", [False, True])
def test_what_a_pass_computes_with_gradients_is_not_held_but_for_queries(queries):
    linear = nn.Linear(6, 5)
    held = outputs.PassOutputs([(linear, queries)])
    made = held.recording()[linear](numbers(2, 5, 6))
    assert made.requires_grad and set(held.reusing(Places(INDEX, 5))) == ({linear} if queries else set())


CASES = {"as it was": True, "once more": False, "twice": False, "changed": False, "fewer rows": False}
CASES |= {"fewer tokens": False, "other slots": False, "flat": False, "all flat": False}


@pytest.mark.parametrize("case", CASES)
def test_which_outputs_belong_to_the_kept_tokens(case):
    """Those of a layer that ran once on all tokens, and was not changed since."""
    linear, x, places = nn.Linear(6, 5), numbers(2, 5, 6), Places(INDEX, 5)
    held = outputs.PassOutputs([(linear, False)])
    given = {"fewer rows": x[:1], "fewer tokens": x[:, :4], "all flat": x.flatten(0, 1)}.get(case, x)
    with torch.no_grad():
        made = held.recording()[linear](given)
        if case == "twice":
            held.recording()[linear](x)
    if case == "changed":
        made.mul_(2)
    kept = numbers(2, 2, 6, seed=3)  # not what the output was made of
    kept = {"other slots": kept[:, :1], "flat": kept.flatten(0, 1), "all flat": kept.flatten(0, 1)}.get(case, kept)
    reuse = held.reusing(places)[linear]
    if case == "once more":
        reuse(kept)
    out = reuse(kept)
    wanted = made.gather(1, INDEX[:, :, None].expand(-1, -1, 5)) if CASES[case] else linear(kept)
    torch.testing.assert_close(out, wanted)
