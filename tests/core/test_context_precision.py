"""Tokens without a gradient in FP8: what runs in it, what does not, and how much kept tokens change."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cggr_core import (
    CGGRModel,
    Selection,
    create_truncated_router,
    keep_tokens,
    linear_token_statistics,
    routed_hidden,
    routed_logprobs,
    token_statistics,
)
from cggr_core.backends import has_fp8_products
from cggr_core.difficulty import FIELDS, linear_difficulty_fp8, linear_difficulty_reference
from cggr_core.fp8 import product, quantize_rows, quantize_silu_mul_reference
from cggr_core.routing import Engine
from cggr_core.settings import RoutingSettings
from tests.support.model_steps import ROUTED, backward, checkpoint_activations, routed, tokens
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE

pytestmark = pytest.mark.filterwarnings("ignore:context_precision='fp8' is emulated:UserWarning")

FP8 = {"context_precision": "fp8"}


def sizes(name="llama", **settings):
    """A tiny model whose sizes are multiples of 16."""
    return ROUTABLE[name](**{"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, **settings})


def cosine(value, expected):
    flat, other = (torch.cat([part.flatten() for part in grads.values()]) for grads in (value, expected))
    return float(nn.functional.cosine_similarity(flat, other, dim=0))


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """Sizes (rows, features in, features out) of the products in FP8."""
    seen: list[tuple[int, ...]] = []

    def note(x, x_scale, weight, weight_scale, bias=None):
        seen.append((*x.shape, weight.shape[0]))
        return product(x, x_scale, weight, weight_scale, bias)

    monkeypatch.setattr("cggr_core.routing.precision.product", note)
    return seen


def test_rows_have_their_own_scales():
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 5)[:, None]
    rows, scale = quantize_rows(x)
    assert rows.dtype == torch.float8_e4m3fn
    assert rows.float().abs().amax(1).tolist() == [448.0] * 5
    # Three bits after the leading one, but for what is 2^15 times smaller than the row's largest.
    torch.testing.assert_close(rows.float() * scale, x, rtol=2**-4, atol=float(scale.max()) * 2**-10)


def test_zeros_and_what_is_no_number():
    x = torch.tensor([[0.0, 0.0], [torch.nan, 1.0], [torch.inf, 1.0], [1e-38, 0.0]])
    rows, scale = quantize_rows(x)
    assert rows[0].float().tolist() == [0.0, 0.0]
    assert scale.isfinite()[[0, 3]].all()
    assert (rows.float() * scale)[1:3].isnan().all()


def test_the_gated_product_is_rounded_once():
    gate, up = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    rows, scale = quantize_silu_mul_reference(gate, up)
    wanted = quantize_rows(nn.functional.silu(gate) * up)
    assert rows.float().equal(wanted[0].float())
    assert scale.equal(wanted[1])


@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_as_far_off_as_its_factors(biased):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((40, 256), (32, 256), (32,)))
    bias = bias if biased else None
    found = product(*quantize_rows(x), *quantize_rows(weight), bias)
    assert found.dtype == torch.bfloat16
    exact = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    error = float((found.double() - exact).norm() / exact.norm())
    # Two factors, each rounded to a relative step of 2^-3 (uniformly within half of it).
    assert 0.01 < error < 2 * 2**-4


@pytest.mark.parametrize(("gradient", "engine"), ROUTED)
def test_kept_tokens_are_moved_a_little(gradient, engine, products):
    model, input_ids = sizes(), tokens()
    own, own_gradients = backward(routed(model, gradient, engine), input_ids, draw=0)
    assert not products
    low, low_gradients = backward(routed(model, gradient, engine, **FP8), input_ids, draw=0)
    assert products
    assert low != own
    torch.testing.assert_close(low, own, rtol=0.02, atol=0)
    assert cosine(low_gradients, own_gradients) > 0.99
    again, again_gradients = backward(routed(model, gradient, engine), input_ids, draw=0)
    assert again.equal(own)
    assert relative_error(again_gradients, own_gradients) == 0.0


@pytest.mark.parametrize("gradient", ["kv", "detached"])
def test_engines_agree_on_what_runs_in_fp8(gradient, products):
    """Both run the same products, except for kept tokens and whatever follows the last layer's keys and values."""
    model, input_ids = sizes(), tokens()
    wrapped = routed(model, gradient, "two_pass", selection="random", min_tokens_ratio=0.5, **FP8)
    backward(wrapped, input_ids, draw=0)
    products.clear()
    backward(wrapped, input_ids, draw=0)
    everywhere = list(products)
    kept = int(wrapped.metrics["kept_tokens"])
    wrapped = routed(model, gradient, "interleaved", min_tokens_ratio=0.5, **FP8)
    backward(wrapped, input_ids, draw=0)
    products.clear()
    backward(wrapped, input_ids, draw=0)
    rows = input_ids.numel()
    of_a_layer = {"kv": ["q", "o", "gate", "up", "down"], "detached": ["q", "k", "v", "o", "gate", "up", "down"]}
    of_the_last = {"kv": ["q"], "detached": ["q", "k", "v"]}
    layers = len(model.model.layers)
    assert {shape[0] for shape in everywhere} == {rows}
    assert {shape[0] for shape in products} == {rows - kept}
    assert len(everywhere) == layers * len(of_a_layer[gradient])
    assert len(products) == (layers - 1) * len(of_a_layer[gradient]) + len(of_the_last[gradient])


def test_kept_tokens_themselves_are_in_the_models_precision():
    """If all tokens are kept, there are no others, and nothing runs in FP8."""
    model, input_ids = sizes(), tokens()
    everything = torch.ones_like(input_ids, dtype=torch.bool)
    labels = torch.randint(3, 90, input_ids.shape, generator=torch.Generator().manual_seed(1))
    for gradient in ("kv", "detached"):
        made = []
        for settings in ({}, FP8):
            result = routed_logprobs(
                model, input_ids, keep=everything, targets=labels, gradient_mode=gradient, **settings
            )
            result.logprob.sum().backward()
            made.append((result.logprob.detach(), gradients(model)))
        assert made[0][0].equal(made[1][0])
        assert relative_error(made[1][1], made[0][1]) == 0.0


@pytest.mark.parametrize("gradient", ["kv", "detached"])
def test_checkpointed_layers_are_recomputed_as_they_were(gradient, products):
    input_ids = tokens()
    plain = backward(routed(sizes(), gradient, "interleaved", **FP8), input_ids, draw=0)
    model = sizes()
    checkpoint_activations(model)
    count = len(products)
    recomputed = backward(routed(model, gradient, "interleaved", **FP8), input_ids, draw=0)
    assert len(products) == 2 * count, "other tokens are run once, also where the kept ones are recomputed"
    assert recomputed[0].equal(plain[0])
    assert relative_error(recomputed[1], plain[1]) <= 1e-6


@pytest.mark.parametrize(("gradient", "engine"), ROUTED)
def test_weights_are_quantised_as_they_are_now(gradient, engine):
    """Also after a change that torch's version counters miss."""
    model, input_ids = sizes(), tokens()
    wrapped = routed(model, gradient, engine, **FP8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    backward(wrapped, input_ids, draw=0)
    wrapped(input_ids, labels=input_ids, draw=0).backward()
    optimizer.step()
    optimizer.zero_grad()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.mul_(1.5)
    stepped = backward(wrapped, input_ids, draw=0)
    fresh = backward(routed(model, gradient, engine, **FP8), input_ids, draw=0)
    assert stepped[0].equal(fresh[0])
    assert relative_error(stepped[1], fresh[1]) == 0.0


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
def test_under_autocast(engine, products):
    model, input_ids = sizes(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        own, own_gradients = backward(routed(model, "detached", engine), input_ids, draw=0)
        low, low_gradients = backward(routed(model, "detached", engine, **FP8), input_ids, draw=0)
    assert products
    torch.testing.assert_close(low, own, rtol=0.02, atol=0)
    assert cosine(low_gradients, own_gradients) > 0.98


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapters_own_matrices_stay_as_they_are(products):
    model = get_peft_model(sizes(), LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False))
    input_ids = tokens()
    own = backward(routed(model, "detached", "interleaved"), input_ids, draw=0)
    low = backward(routed(model, "detached", "interleaved", **FP8), input_ids, draw=0)
    assert {shape[1:] for shape in products} == {(64, 64), (64, 32), (64, 96), (96, 64)}
    torch.testing.assert_close(low[0], own[0], rtol=0.02, atol=0)
    assert cosine(low[1], own[1]) > 0.98


class Quantised(nn.Linear):
    """A stand-in for the linear layers of quantisation libraries."""


def test_what_is_left_alone(products):
    model, input_ids = sizes("mixtral"), tokens()
    first, second, third = model.model.layers
    first.self_attn.q_proj.__class__ = Quantised
    third.self_attn.q_proj.forward = second.self_attn.q_proj.forward  # somebody's own
    wrapped = routed(model, "kv", "two_pass", **FP8)
    backward(wrapped, input_ids, draw=0)
    products.clear()
    backward(wrapped, input_ids, draw=0)
    # The second layer's queries, and what every attention gives; experts are no linear layers, their router is not
    # touched.
    assert len(products) == 4


def test_sizes_that_devices_do_not_take_are_left_alone(products):
    model, input_ids = sizes(intermediate_size=90), tokens()
    backward(routed(model, "kv", "two_pass", **FP8), input_ids, draw=0)
    assert {shape[1:] for shape in products} == {(64, 64)}


@pytest.mark.parametrize("name", ["phi3", "gpt-neox", "gemma2", "qwen3"])
def test_other_architectures(name, products):
    model, input_ids = sizes(name), tokens()
    for gradient, engine in ROUTED:
        products.clear()
        own = backward(routed(model, gradient, engine), input_ids, draw=0)
        low = backward(routed(model, gradient, engine, **FP8), input_ids, draw=0)
        assert products
        torch.testing.assert_close(low[0], own[0], rtol=0.02, atol=0)
        assert cosine(low[1], own[1]) > 0.98


def test_a_truncated_router_scores_from_the_same_pass(products):
    model, input_ids = sizes(), tokens()
    wrapped = CGGRModel(model, create_truncated_router(model, 1), **FP8).train()
    backward(wrapped, input_ids, draw=0)
    products.clear()
    backward(wrapped, input_ids, draw=0)
    rows = [shape[0] for shape in products]
    assert rows.count(input_ids.numel()) == 5, "the first layer, on all tokens"
    assert wrapped.metrics["engine"] == "interleaved"


def test_inputs_are_quantised_once_for_all_that_read_them(monkeypatch):
    counted = []

    def counting(x):
        counted.append(tuple(x.shape))
        return quantize_rows(x)

    monkeypatch.setattr("cggr_core.routing.precision.quantize_rows", counting)
    model, input_ids = sizes(), tokens()
    wrapped = routed(model, "detached", "two_pass", **FP8)
    backward(wrapped, input_ids, draw=0)
    counted.clear()
    backward(wrapped, input_ids, draw=0)
    activations = [shape for shape in counted if shape[0] == input_ids.numel()]
    # For queries, keys and values; the output; the two halves of the MLP. The last is made with the gated product.
    assert len(activations) == 3 * len(model.model.layers)
    assert len(counted) - len(activations) == 7 * len(model.model.layers)


def test_logprobs_and_hidden_states_read_it(products):
    model, input_ids = sizes(), tokens()
    keep = keep_tokens(torch.arange(12).expand(3, -1) >= 9)
    own = routed_logprobs(model, input_ids, keep=keep)
    low = routed_logprobs(model, input_ids, keep=keep, **FP8)
    assert products
    assert not low.logprob.equal(own.logprob)
    torch.testing.assert_close(low.logprob, own.logprob, rtol=0.1, atol=0.05)
    products.clear()
    both = (routed_hidden(model, input_ids, keep=keep, **settings).hidden for settings in ({}, FP8))
    first, second = both
    assert products
    assert relative_error({"states": second.detach()}, {"states": first.detach()}) < 0.05
    with torch.no_grad():
        products.clear()
        routed_logprobs(model, input_ids, keep=keep, **FP8)
        assert not products, "without gradients it is one plain forward"


@pytest.mark.parametrize("gradient", ["exact", "sequence"])
def test_modes_without_such_tokens_are_refused(gradient):
    with pytest.raises(ValueError, match=f"context_precision='fp8' applies only to.*gradient is '{gradient}'"):
        RoutingSettings(gradient=gradient, **FP8)


def test_refusals_of_calls():
    model, input_ids = sizes(), tokens()
    keep = torch.ones_like(input_ids, dtype=torch.bool)
    with pytest.raises(ValueError, match="gradient_mode is 'exact'; leave context_precision=None"):
        routed_logprobs(model, input_ids, keep=keep, gradient_mode="exact", **FP8)
    with pytest.raises(ValueError, match="context_precision must be"):
        CGGRModel(model, context_precision="fp4")


@pytest.mark.filterwarnings("error")
def test_the_emulation_says_so_once():
    model, input_ids = sizes(), tokens()
    wrapped = routed(model, "kv", "interleaved", **FP8)
    with pytest.warns(UserWarning, match="context_precision='fp8' is emulated on cpu") as caught:
        wrapped(input_ids, labels=input_ids)
        wrapped(input_ids, labels=input_ids)
    assert len(caught) == 1


def test_no_step_keeps_more_than_the_one_before():
    model, input_ids = sizes(), tokens()
    wrapped = routed(model, "kv", "two_pass", **FP8)
    backward(wrapped, input_ids, draw=0)
    engine: Engine = wrapped._passes
    assert engine._low_precision is not None
    assert engine._low_precision._last is None
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_step_stays_finite_on_a_cpu_that_has_no_fp8():
    assert not has_fp8_products(torch.device("cpu"))
    loss, _ = backward(routed(sizes(), "kv", "two_pass", **FP8), tokens(), draw=0)
    assert math.isfinite(loss)


def head_problem(rows=40, features=64, classes=96):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*size, generator=generator) for size in ((rows, features), (classes, features), (classes,))
    )
    targets = torch.randint(0, classes, (rows,), generator=generator)
    targets[::5] = -100
    return hidden, 0.3 * weight, targets, bias


@pytest.mark.parametrize("numbers", [{}, {"softcap": 5.0}, {"scale": 0.5}, {"softcap": 5.0, "scale": 2.0}])
@pytest.mark.parametrize("biased", [False, True])
def test_statistics_are_those_of_logits_made_in_fp8(numbers, biased, monkeypatch):
    hidden, weight, targets, bias = head_problem()
    monkeypatch.setattr("cggr_core.difficulty._FP8_CHUNK", 5 * 96)  # several chunks, the last one not full
    monkeypatch.setattr("cggr_core.difficulty._FP8_ROWS", 7)
    given = {"bias": bias if biased else None, **numbers}
    low = linear_token_statistics(hidden, weight, targets, precision="fp8", **given)
    logits = product(*quantize_rows(hidden), *quantize_rows(weight), given["bias"]).float()
    logits = logits * numbers.get("scale", 1.0)
    if "softcap" in numbers:
        logits = numbers["softcap"] * torch.tanh(logits / numbers["softcap"])
    for found, wanted in zip(low[:5], token_statistics(logits, targets)[:5], strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)  # rounded to bfloat16 again
    own = linear_token_statistics(hidden, weight, targets, **given)
    assert not low.nll.equal(own.nll)
    torch.testing.assert_close(low.nll, own.nll, rtol=0.1, atol=0.3)
    assert low.nll[::5].eq(0).all()


def test_statistics_of_what_does_not_fit_are_in_its_own_precision():
    hidden, weight, targets, _ = head_problem(classes=90)
    for x, w in ((hidden, weight), (hidden.double(), weight.double()), (hidden[:0], weight)):
        of = targets[: len(x)]
        low, own = (linear_token_statistics(x, w, of, precision=precision) for precision in ("fp8", None))
        assert low.gradnorm.equal(own.gradnorm)
    with pytest.raises(ValueError, match="precision must be"):
        linear_token_statistics(hidden, weight, targets, precision="fp4")


@pytest.mark.parametrize("truncated", [False, True])
def test_scores_are_made_in_fp8_where_that_is_asked_for(truncated, monkeypatch):
    seen = []

    def note(*arguments):
        made = linear_difficulty_fp8(*arguments)
        seen.append((made[FIELDS.index("gradnorm")], linear_difficulty_reference(*arguments)[FIELDS.index("gradnorm")]))
        return made

    monkeypatch.setattr("cggr_core.statistics.linear_difficulty_fp8", note)
    model, input_ids = sizes(vocab_size=96), tokens()
    router = create_truncated_router(model, 1) if truncated else None
    backward(CGGRModel(model, router).train(), input_ids, draw=0)
    assert not seen
    backward(CGGRModel(model, router, **FP8).train(), input_ids, draw=0)
    for gradient in ("kv", "exact", "sequence"):
        backward(CGGRModel(model, router, gradient=gradient, score_precision="fp8").train(), input_ids, draw=0)
    assert len(seen) == 4
    for low, own in seen:
        assert not low.equal(own)
        torch.testing.assert_close(low, own, rtol=0.02, atol=0)


def test_only_scores_in_fp8_leave_what_is_kept_as_it_is(products):
    model, input_ids = sizes(vocab_size=96), tokens()
    selection = Selection.from_mask((torch.arange(12).expand(3, -1) >= 8) & (torch.arange(12) < 11))
    wanted = backward(CGGRModel(model), input_ids, draw=0, selection=selection)
    found = backward(CGGRModel(model, score_precision="fp8"), input_ids, draw=0, selection=selection)
    assert found[0].equal(wanted[0])
    assert relative_error(found[1], wanted[1]) == 0.0
    assert not products


def test_a_precision_of_scores_that_are_not_the_heads_is_refused():
    model = sizes(vocab_size=96)
    with pytest.raises(ValueError, match="score_precision='fp8' applies to scores, but selection='random' uses none"):
        CGGRModel(model, selection="random", score_precision="fp8")
    with pytest.raises(ValueError, match="score_precision='fp8' is the precision of the model's head, but function"):
        CGGRModel(model, lambda input_ids: input_ids, score_precision="fp8")
    with pytest.raises(ValueError, match="score_precision must be"):
        CGGRModel(model, score_precision="fp4")
