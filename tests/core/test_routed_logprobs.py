"""Log-probabilities and hidden states with routed gradients: the same step as CGGRModel's, under any loss."""

import pytest
import torch

from cggr_core import (
    CGGRModel,
    Selection,
    difficulty,
    head_chunks,
    keep_random,
    keep_tokens,
    routed_hidden,
    routed_logprobs,
)
from tests.support.allocations import largest_allocation
from tests.support.logprobs import LENGTH, WAYS, next_tokens, plain, reference, slots, some
from tests.support.model_steps import tokens
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, UNROUTABLE


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_the_step_is_that_of_cggr_model(name, gradient, engine):
    model, input_ids = ROUTABLE[name](), tokens(3, LENGTH)
    selection = slots(some())
    settings = {"gradient": gradient, "engine": engine, "selection": "random"}
    wanted_loss = CGGRModel(model, **settings)(input_ids, labels=input_ids, selection=selection)
    wanted_loss.backward()
    wanted = gradients(model)
    found = routed_logprobs(model, input_ids, keep=selection, gradient_mode=gradient, engine=engine)
    loss = -(found.logprob * found.weight).sum() / (3 * (LENGTH - 1))
    loss.backward()
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    assert relative_error(gradients(model), wanted) <= 1e-6


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
@pytest.mark.parametrize("name", [name for name in ROUTABLE if "masked" not in name])
def test_any_loss_equals_the_autograd_reference(name, gradient):
    model, input_ids = ROUTABLE[name](), tokens(3, LENGTH)
    keep, weight = some(), torch.randn(3, LENGTH)
    wanted = reference(model, input_ids, keep, weight, gradient)
    expected, _ = plain(model, input_ids)
    found = routed_logprobs(model, input_ids, keep=keep if gradient == "exact" else slots(keep), gradient_mode=gradient)
    torch.testing.assert_close(found.logprob[keep], expected[keep], rtol=1e-4, atol=1e-4)
    assert (found.logprob[~keep] == 0).all() and (found.keep == keep).all() and (found.weight == keep).all()
    (-weight * found.logprob).sum().backward()
    assert relative_error(gradients(model), wanted) <= 1e-5


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
def test_entropy_takes_gradients_too(gradient, engine):
    model, input_ids, keep = ROUTABLE["llama"]().double(), tokens(3, LENGTH), some()
    keep[:] = True
    keep[:, -1] = False
    for temperature in (1.0, 0.7):
        logprob, entropy = plain(model, input_ids, temperature)
        ((logprob - 0.3 * entropy) * keep).sum().backward()
        wanted = gradients(model)
        everything = Selection.from_mask(
            torch.ones_like(keep), weight=torch.ones(keep.shape), countable=keep, capacity=LENGTH
        )
        targets = next_tokens(input_ids)
        targets[:, -1] = 0  # so that every position can be kept, and the step is ordinary training in every mode
        found = routed_logprobs(
            model,
            input_ids,
            keep=everything,
            targets=targets,
            gradient_mode=gradient,
            engine=engine,
            entropy=True,
            temperature=temperature,
        )
        torch.testing.assert_close(found.entropy[keep], entropy[keep])
        ((found.logprob - 0.3 * found.entropy) * keep).sum().backward()
        assert relative_error(gradients(model), wanted) <= 1e-10


@pytest.mark.parametrize(("gradient", "engine"), [way for way in WAYS if way[1] != "interleaved"])
def test_everywhere_gives_the_others_as_constants(gradient, engine):
    model, input_ids, keep = ROUTABLE["gemma2"](), tokens(3, LENGTH), slots(some())
    logprob, entropy = plain(model, input_ids, 0.8)
    only = routed_logprobs(
        model, input_ids, keep=keep, gradient_mode=gradient, engine=engine, entropy=True, temperature=0.8
    )
    (only.logprob + only.entropy).square().sum().backward()
    wanted = gradients(model)
    found = routed_logprobs(
        model,
        input_ids,
        keep=keep,
        gradient_mode=gradient,
        engine=engine,
        entropy=True,
        temperature=0.8,
        everywhere=True,
    )
    torch.testing.assert_close(found.logprob[:, :-1], logprob[:, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.entropy[:, :-1], entropy[:, :-1], rtol=1e-4, atol=1e-4)
    (found.logprob + found.entropy).square().sum().backward()
    assert relative_error(gradients(model), wanted) <= 1e-6


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
def test_rows_that_keep_nothing_are_not_run(gradient, engine):
    model, input_ids, keep = ROUTABLE["llama"](), tokens(4, LENGTH), some(4)
    keep[0], keep[2] = False, False
    seen = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    found = routed_logprobs(model, input_ids, keep=keep, gradient_mode=gradient, engine=engine)
    hook.remove()
    assert seen[-1] == 2
    assert (found.keep == keep).all() and (found.weight == keep).all()
    weight = torch.randn(4, LENGTH)
    (-weight * found.logprob).sum().backward()
    assert relative_error(gradients(model), reference(model, input_ids, keep, weight, gradient)) <= 1e-5


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
def test_nothing_kept_is_zero_and_connected(gradient, engine):
    model, input_ids = ROUTABLE["llama"](), tokens(2, LENGTH)
    nothing = torch.zeros(2, LENGTH, dtype=torch.bool)
    found = routed_logprobs(model, input_ids, keep=nothing, gradient_mode=gradient, engine=engine, entropy=True)
    assert found.logprob.abs().sum() == 0 and found.entropy.abs().sum() == 0 and not found.keep.any()
    (found.logprob.sum() / found.keep.sum().clamp(min=1) + found.entropy.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(not grad.any() for grad in gradients(model).values())
    states = routed_hidden(model, input_ids, keep=nothing, gradient_mode=gradient, engine=engine)
    assert states.hidden.requires_grad and not states.hidden.any() and not states.selection.valid.any()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("gradient", "engine"), WAYS)
def test_padded_rows(side, gradient, engine):
    model, input_ids = ROUTABLE["llama"](), tokens(3, LENGTH)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, slice(0, 4) if side == "left" else slice(LENGTH - 4, LENGTH)] = 0
    keep = some() & keep_tokens(attention_mask.bool()) & attention_mask.bool()
    weight, inputs = torch.randn(3, LENGTH), {"attention_mask": attention_mask}
    found = routed_logprobs(model, input_ids, keep=slots(keep), gradient_mode=gradient, engine=engine, **inputs)
    (-weight * found.logprob).sum().backward()
    assert relative_error(gradients(model), reference(model, input_ids, keep, weight, gradient, **inputs)) <= 1e-5


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
def test_packed_rows(gradient, engine):
    model, input_ids = ROUTABLE["llama"](), tokens(2, 13)
    position_ids = torch.tensor([[*range(6), *range(7)], [*range(3), *range(8), *range(2)]])
    keep = some(2, 13, share=0.6)
    keep[:, :-1] &= position_ids[:, 1:] != 0
    weight, inputs = torch.randn(2, 13), {"position_ids": position_ids}
    found = routed_logprobs(model, input_ids, keep=slots(keep, 9), gradient_mode=gradient, engine=engine, **inputs)
    (-weight * found.logprob).sum().backward()
    total = gradients(model)
    documents = [(0, 0, 6), (0, 6, 13), (1, 0, 3), (1, 3, 11), (1, 11, 13)]
    parts = [
        reference(model, *(part[row, start:stop][None] for part in (input_ids, keep, weight)), gradient)
        for row, start, stop in documents
    ]
    assert relative_error(total, {name: sum(part[name] for part in parts) for name in total}) <= 1e-5
    keep[0, 5] = True
    with pytest.raises(ValueError, match=r"keep marks 1 position\(s\) that predict no token"):
        routed_logprobs(model, input_ids, keep=keep, gradient_mode=gradient, engine=engine, **inputs)


def test_weights_of_a_random_selection_come_back():
    model, input_ids = ROUTABLE["llama"](), tokens(3, LENGTH)
    kept = keep_random(keep_tokens(torch.ones_like(input_ids).bool()), 0.3, seed=2)
    found = routed_logprobs(model, input_ids, keep=kept)
    assert (found.keep == kept.mask).all()
    torch.testing.assert_close(found.weight[found.keep], torch.full((12,), 13 / 4))
    assert (found.weight[~found.keep] == 0).all()


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
def test_hidden_states_and_a_head_of_ones_own(gradient, engine):
    model, input_ids, keep = ROUTABLE["llama"](), tokens(3, LENGTH), some()
    keep[1] = False
    found = routed_logprobs(model, input_ids, keep=keep, gradient_mode=gradient, engine=engine)
    weight = torch.randn(3, LENGTH)
    (weight * found.logprob).sum().backward()
    wanted = gradients(model)
    states = routed_hidden(model, input_ids, keep=keep, gradient_mode=gradient, engine=engine)
    assert states.selection.shape == (3, LENGTH) and (states.selection.mask == keep).all()
    assert (states.hidden[~states.selection.valid] == 0).all()
    logprobs = model.lm_head(states.hidden).log_softmax(-1)
    targets = states.selection.gather(next_tokens(input_ids)).clamp(min=0)
    logprob = logprobs.gather(2, targets[:, :, None])[:, :, 0]
    (logprob * states.selection.gather(weight) * states.selection.valid).sum().backward()
    assert relative_error(gradients(model), wanted) <= 1e-6


def test_without_gradients_it_is_one_plain_forward_of_any_model():
    for model in (ROUTABLE["llama"](), UNROUTABLE["mamba"]()):
        input_ids, keep = tokens(3, LENGTH), some()
        expected, spread = plain(model, input_ids)
        with torch.no_grad():
            found = routed_logprobs(model, input_ids, keep=keep, entropy=True, everywhere=True)
        assert not found.logprob.requires_grad
        torch.testing.assert_close(found.logprob[:, :-1], expected[:, :-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.entropy[:, :-1], spread[:, :-1], rtol=1e-4, atol=1e-4)


def test_no_logits_of_all_tokens_are_made(monkeypatch):
    monkeypatch.setattr(head_chunks, "_CPU_CHUNK", 4096)
    monkeypatch.setattr(difficulty, "_CPU_HEAD_CHUNK", 4096)
    model, input_ids = ROUTABLE["llama"](vocab_size=1024), tokens(4, 60)
    keep = some(4, 60, share=0.8)
    routed_logprobs(model, input_ids, keep=keep)

    for gradient, everywhere in (("exact", True), ("kv", True), ("kv", False)):

        def step(gradient=gradient, everywhere=everywhere):
            found = routed_logprobs(
                model, input_ids, keep=keep, gradient_mode=gradient, entropy=True, everywhere=everywhere
            )
            (found.logprob + found.entropy).sum().backward()

        assert largest_allocation(step) < 4 * 60 * 1024 / 4


def test_masked_language_models():
    model, input_ids = ROUTABLE["bert-masked"](), tokens(2, LENGTH)
    keep, targets = some(2), tokens(2, LENGTH, seed=1)
    with pytest.raises(ValueError, match="targets must be given for a masked language model"):
        routed_logprobs(model, input_ids, keep=keep)
    targets[~keep] = -100
    found = routed_logprobs(model, input_ids, keep=keep, targets=targets)
    logits = model(input_ids=input_ids).logits
    expected = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    torch.testing.assert_close(found.logprob, expected)


def test_inputs_embeds():
    model, input_ids, keep = ROUTABLE["llama"](), tokens(2, LENGTH), some(2)
    wanted = routed_logprobs(model, input_ids, keep=keep)
    embeds = model.get_input_embeddings()(input_ids)
    found = routed_logprobs(model, inputs_embeds=embeds, keep=keep, targets=next_tokens(input_ids))
    torch.testing.assert_close(found.logprob, wanted.logprob)
    with pytest.raises(ValueError, match="targets must be given with inputs_embeds"):
        routed_logprobs(model, inputs_embeds=embeds, keep=keep)


def test_balancing_loss_of_experts():
    model = ROUTABLE["mixtral"](output_router_logits=True, router_aux_loss_coef=0.1)
    input_ids, keep = tokens(2, LENGTH), slots(some(2))
    loss = CGGRModel(model)(input_ids, labels=input_ids, selection=keep)
    found = routed_logprobs(model, input_ids, keep=keep)
    torch.testing.assert_close(loss, found.auxiliary_loss - found.logprob.sum() / (2 * (LENGTH - 1)))
