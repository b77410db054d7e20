"""Rows that share a context, run once, equal rows that each include it."""

import weakref
from dataclasses import replace

import pytest
import torch

from cggr_core import SharedContext, routed_hidden, routed_logprobs
from cggr_core.routing import Shared
from cggr_core.routing import shared as shared_contexts
from tests.support.logprobs import WAYS, slots, some
from tests.support.model_steps import checkpoint_activations, tokens
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, UNROUTABLE, VOCAB

PROMPTS, GROUP, BEFORE, LENGTH = 2, 3, 7, 9
ROWS = PROMPTS * GROUP


def batch(padded=False, owners=None):
    """A context, the rows' inputs, and the inputs with the context before every row."""
    prompts = torch.randint(3, VOCAB, (PROMPTS, BEFORE + 1), generator=torch.Generator().manual_seed(0))
    completions = torch.randint(3, VOCAB, (ROWS, LENGTH - 1), generator=torch.Generator().manual_seed(1))
    of_row = torch.arange(ROWS) // GROUP if owners is None else owners
    rows = torch.cat([prompts[of_row, -1:], completions], dim=1)
    before = prompts[:, :-1]
    context = SharedContext(before, rows=owners)
    shared, repeated = {"input_ids": rows}, {"input_ids": torch.cat([before[of_row], rows], dim=1)}
    if padded:
        prompt_mask, row_mask = torch.ones_like(before), torch.ones_like(rows)
        prompt_mask[0, :3], row_mask[1, -2:] = 0, 0
        context = SharedContext(before, prompt_mask, owners)
        shared["attention_mask"] = row_mask
        repeated["attention_mask"] = torch.cat([prompt_mask[of_row], row_mask], dim=1)
    return context, shared, repeated


def kept():
    keep = some(ROWS, LENGTH)
    keep[:, 0] = True  # predicts the first token of the completion
    keep[1, -3:] = False
    return keep


def before_rows(keep):
    return torch.cat([torch.zeros(ROWS, BEFORE, dtype=torch.bool), keep], dim=1)


def step(model, keep, inputs, *, gradient="kv", engine=None, capacity=6, **more):
    """Log-probabilities of the rows, and gradients of a loss of them and of the entropies."""
    form = slots(keep, capacity) if capacity else keep
    found = routed_logprobs(model, **inputs, keep=form, gradient_mode=gradient, engine=engine, entropy=True, **more)
    weight = torch.randn(ROWS, LENGTH, generator=torch.Generator().manual_seed(2))
    logprob = found.logprob[:, -LENGTH:]
    (weight * (logprob + found.entropy[:, -LENGTH:])).sum().backward()
    return logprob.detach(), gradients(model)


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert relative_error(found[1], wanted[1]) <= 1e-5


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
@pytest.mark.parametrize("name", [name for name in ROUTABLE if "masked" not in name])
def test_equals_the_repeated_form(name, gradient):
    model, (context, shared, repeated) = ROUTABLE[name](), batch()
    wanted = step(model, before_rows(kept()), repeated, gradient=gradient)
    assert_same(step(model, kept(), shared, gradient=gradient, context=context), wanted)


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon-alibi"])
def test_padded_contexts_and_rows(name, gradient, engine):
    model, (context, shared, repeated) = ROUTABLE[name](), batch(padded=True)
    wanted = step(model, before_rows(kept()), repeated, gradient=gradient, engine=engine)
    assert_same(step(model, kept(), shared, gradient=gradient, engine=engine, context=context), wanted)


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
def test_rows_in_any_order(gradient, engine):
    owners = torch.tensor([1, 0, 0, 1, 1, 1])
    model, (context, shared, repeated) = ROUTABLE["llama"](), batch(padded=True, owners=owners)
    wanted = step(model, before_rows(kept()), repeated, gradient=gradient, engine=engine)
    assert_same(step(model, kept(), shared, gradient=gradient, engine=engine, context=context), wanted)


@pytest.mark.parametrize("without", [[0, 3], [0, 1, 2], [1], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("gradient", ["exact", "kv"])
@pytest.mark.parametrize("owners", [None, torch.tensor([1, 0, 0, 1, 1, 1])])
def test_rows_that_keep_nothing_are_not_run_nor_are_their_contexts(owners, gradient, without):
    model, (context, shared, repeated) = ROUTABLE["llama"](), batch(padded=True, owners=owners)
    keep = kept()
    keep[without] = False
    wanted = step(model, before_rows(keep), repeated, gradient=gradient, capacity=None)
    found = step(model, keep, shared, gradient=gradient, capacity=None, context=context)
    if keep.any():
        assert_same(found, wanted)
    else:
        assert not found[0].any() and not any(grad.any() for grad in found[1].values())


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
def test_checkpointing_changes_nothing(gradient, engine):
    model, (context, shared, _) = ROUTABLE["llama"](), batch()
    wanted = step(model, kept(), shared, gradient=gradient, engine=engine, context=context)
    checkpoint_activations(model)
    assert_same(step(model, kept(), shared, gradient=gradient, engine=engine, context=context), wanted)


@pytest.mark.parametrize("gradient", ["exact", "kv"])
def test_everywhere_and_without_gradients(gradient):
    model, (context, shared, repeated) = ROUTABLE["gemma2"](), batch()
    settings = {"gradient_mode": gradient, "entropy": True, "everywhere": True}
    wanted = routed_logprobs(model, **repeated, keep=before_rows(kept()), **settings)
    found = routed_logprobs(model, **shared, keep=kept(), context=context, **settings)
    with torch.no_grad():
        constant = routed_logprobs(model, **shared, keep=kept(), context=context, **settings)
    for value in (found, constant):
        torch.testing.assert_close(value.logprob[:, :-1], wanted.logprob[:, BEFORE:-1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(value.entropy[:, :-1], wanted.entropy[:, BEFORE:-1], rtol=1e-4, atol=1e-4)
    assert found.logprob.requires_grad and not constant.logprob.requires_grad


def test_hidden_states():
    model, (context, shared, repeated) = ROUTABLE["llama"](), batch(padded=True)
    results = []
    for inputs, keep, more in ((repeated, before_rows(kept()), {}), (shared, kept(), {"context": context})):
        states = routed_hidden(model, **inputs, keep=slots(keep, 6), **more)
        states.hidden.square().sum().backward()
        results.append((states.hidden[states.selection.valid].detach(), gradients(model)))
    assert_same(*results)


def test_half_precision_sums_the_rows_in_float32():
    owners = torch.arange(ROWS) // GROUP
    model = ROUTABLE["llama"]()
    wanted = step(model, kept(), batch()[1], context=batch()[0])[1]
    for order in (None, owners):
        context, shared, _ = batch(owners=order)
        with torch.autocast("cpu", torch.bfloat16):
            found = step(model, kept(), shared, context=context)[1]
        assert relative_error(found, wanted) <= 0.05


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
def test_the_context_is_run_once(gradient, engine):
    model, (context, shared, _) = ROUTABLE["llama"](), batch()
    run = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: run.append(out[..., 0].numel()))
    for _ in range(2):
        step(model, kept(), shared, gradient=gradient, engine=engine, context=context)
    run.clear()  # the first calls look at the model, which has code of others: the hook
    step(model, kept(), shared, gradient=gradient, engine=engine, context=context)
    hook.remove()
    again = ROWS * 6 if engine == "two_pass" else 0  # kept tokens, in slots
    assert sum(run) == PROMPTS * BEFORE + ROWS * LENGTH + again


@pytest.mark.parametrize(("gradient", "engine"), WAYS)
def test_no_copy_of_the_context_waits_for_the_backward_pass(gradient, engine, monkeypatch):
    made, before = [], Shared.before

    def noted(*args, **kwargs):
        results = before(*args, **kwargs)
        made.extend(weakref.ref(part.untyped_storage()) for part in results)
        return results

    model, (context, shared, _) = ROUTABLE["llama"](), batch()
    step(model, kept(), shared, gradient=gradient, engine=engine, context=context)
    monkeypatch.setattr(Shared, "before", noted)
    settings = {"gradient_mode": gradient, "engine": engine, "context": context}
    found = routed_logprobs(model, **shared, keep=slots(kept(), 6), **settings)
    assert len(made) >= 6 and not any(reference() for reference in made)
    assert found.logprob.requires_grad


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (SharedContext(tokens(4, 5)), ValueError, "6 rows cannot be divided evenly among 4 contexts"),
        (SharedContext(tokens(2, 5)[0]), ValueError, r"context.input_ids must be \[N, L\]"),
        (SharedContext(tokens(2, 5).float()), TypeError, "context.input_ids must hold integers"),
        (SharedContext(tokens(2, 5), torch.ones(2, 4)), ValueError, r"context.attention_mask must have shape \(2, 5\)"),
        (SharedContext(tokens(2, 5), rows=torch.zeros(2).long()), ValueError, r"context.rows must have shape \(6,\)"),
        (SharedContext(tokens(2, 5), rows=torch.arange(6)), ValueError, r"context.rows must be in \[0, 2\)"),
        (tokens(2, 5), TypeError, "context must be a SharedContext, got Tensor"),
    ],
)
def test_bad_contexts(context, error, message):
    with pytest.raises(error, match=message):
        routed_logprobs(ROUTABLE["llama"](), **batch()[1], keep=kept(), context=context)


def test_what_cannot_go_with_a_context():
    context, shared, _ = batch()
    with pytest.raises(ValueError, match="take input_ids and attention_mask only, got position_ids, token_type_ids"):
        zeros = torch.zeros_like(shared["input_ids"])
        more = {"position_ids": zeros, "token_type_ids": zeros}
        routed_logprobs(ROUTABLE["llama"](), **shared, **more, keep=kept(), context=context)
    with pytest.raises(ValueError, match="a shared context requires routed keys and values"):
        routed_logprobs(UNROUTABLE["mamba"](), **shared, keep=kept(), context=context, gradient_mode="exact")
    model = ROUTABLE["mixtral"](output_router_logits=True)
    with pytest.raises(ValueError, match="cannot compute the expert routers' balancing loss"):
        routed_logprobs(model, **shared, keep=kept(), context=context, gradient_mode="exact")


@pytest.mark.parametrize(("gradient", "wanted"), [("exact", "all"), ("kv", "all"), ("detached", "kept")])
def test_kernels_are_asked_for_the_contexts_gradients(gradient, wanted, monkeypatch):
    """What plain torch gives anyway: gradients of keys that no query of the pass stands at."""
    import cggr_core.routing.gradient_pass as gradient_pass

    asked = []

    class Noting(gradient_pass.LayerRows):
        def __init__(self, index, length, *, key_gradient="all"):
            asked.append(key_gradient)
            super().__init__(index, length, key_gradient=key_gradient)

    model, (context, shared, _) = ROUTABLE["llama"](), batch()
    step(model, kept(), shared, gradient=gradient, context=context)
    monkeypatch.setattr(gradient_pass, "LayerRows", Noting)
    step(model, kept(), shared, gradient=gradient, context=context)
    assert asked[-1] == wanted


def test_a_comparison_with_plain_forwards_leaves_contexts_out(monkeypatch):
    """Rows after a context are not whole rows that could be passed to a plain forward."""
    model, (context, shared, _) = ROUTABLE["llama"](), batch()
    wanted = step(model, kept(), shared, gradient="kv", context=context)
    monkeypatch.setenv("CGGR_VERIFY", "1")
    found = step(model, kept(), shared, gradient="kv", context=context)
    assert relative_error(found[-1], wanted[-1]) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rows", [None, [1, 0, 1, 1, 0, 1]])
def test_rows_add_up_their_contexts_gradients_in_their_own_precision(dtype, rows):
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(2, 3, 4, 5, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    own = tuple(torch.randn(6, 3, 7, 5, generator=generator, dtype=dtype).requires_grad_() for _ in range(2))
    of_row = torch.tensor([0, 0, 0, 1, 1, 1] if rows is None else rows)
    shared = Shared({0: (key, value)}, 4, None if rows is None else of_row, None)
    weight = torch.randn(6, 3, 11, 5, generator=generator, dtype=dtype)
    assert shared.takes_gradients and replace(shared, recorded={0: own, 1: (key.detach(), value)}).takes_gradients
    assert not replace(shared, recorded={0: (key.detach(), value.detach())}).takes_gradients
    wanted = [torch.cat([part[of_row], rest], dim=2) for part, rest in zip((key, value), own, strict=True)]
    operands = (key, value, *own)
    of_wanted = torch.autograd.grad(sum((part * weight).sin().sum() for part in wanted), operands)
    available = tuple(part.detach().clone() for part in wanted)
    for how in (
        {"in_turn": False, "made": None},
        {"in_turn": True, "made": None},
        {"in_turn": False, "made": available},
    ):
        found = shared.before(0, tuple(part * 1 for part in own), constant=False, **how)
        if how["made"]:
            assert [part.data_ptr() for part in found] == [part.data_ptr() for part in available]
        sum((part * weight).sin().sum() for part in found).backward()
        of_found = [part.grad for part in operands]
        for part in operands:
            part.grad = None
        for one, other in zip((*found, *of_found), (*wanted, *of_wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13 if dtype == torch.float64 else 1e-5, atol=1e-12)
    again = shared.before(0, own, constant=True, in_turn=False, made=None)
    reached = torch.autograd.grad(again[0].sum() + again[1].sum(), operands, allow_unused=True)
    assert [grad is not None for grad in reached] == [False, False, True, True]


def test_keys_and_values_are_remade_once_and_without_a_graph():
    weight, made = torch.randn(3, requires_grad=True), []

    def make():
        made.append(1)
        return 2 * weight, 3 * weight

    remade = shared_contexts._Remade(make)
    value, key = remade.take(1), remade.take(0)
    assert torch.equal(key, 2 * weight) and torch.equal(value, 3 * weight)
    assert len(made) == 1 and not key.requires_grad and not value.requires_grad
    remade.take(0)
    assert len(made) == 2, "they are released as they are taken"


@pytest.mark.parametrize("trained", [(True, False), (False, True)])
@pytest.mark.parametrize("rows", [None, torch.tensor([1, 0, 1, 1])])
def test_gradients_of_shared_keys_or_of_the_rows_own(rows, trained):
    shared = torch.randn(2, 3, 4, 5, requires_grad=trained[0])
    own = torch.randn(4, 3, 2, 5, requires_grad=trained[1])
    of_row = torch.arange(4) // 2 if rows is None else rows
    upstream = torch.randn(4, 3, 6, 5)
    wanted = torch.cat([shared[of_row], own], dim=2)
    found = shared_contexts._PutBefore.apply(shared, own, rows, None)
    assert torch.equal(found, wanted)
    part = shared if trained[0] else own
    gradient, wanted_gradient = (torch.autograd.grad(made, part, upstream)[0] for made in (found, wanted))
    torch.testing.assert_close(gradient, wanted_gradient)
