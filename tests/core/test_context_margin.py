"""Tokens before the supervised ones: they have no loss, but its gradient reaches them."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from cggr_core import CGGRModel, Selection
from cggr_core.selection import with_margin
from cggr_core.targets import align_labels
from tests.support.model_steps import backward, tokens
from tests.support.recorded_steps import hold_to_eager, record_at_once
from tests.support.reference_routing import gradients, reference_loss, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB

LENGTH, MARGIN = 40, 7


def batch(seed: int, stretches: list[list[tuple[int, int]]], **more) -> dict:
    """Rows with supervised stretches, given as (first token, one past the last)."""
    input_ids = tokens(rows=len(stretches), length=LENGTH, seed=seed)
    labels = torch.full_like(input_ids, -100)
    for row, places in enumerate(stretches):
        for first, end in places:
            labels[row, first:end] = input_ids[row, first:end]
    return {"input_ids": input_ids, "labels": labels, **more}


STRETCHES = [[(30, 36)], [(3, 6), (20, 22), (25, 40)], []]


@hypothesis.given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 45))
def test_the_margin_is_what_stands_before(row, margin):
    expected = [any(row[place : place + margin + 1]) for place in range(len(row))]
    assert with_margin(torch.tensor([row]), margin)[0].tolist() == expected


def reference(base, layers, given, gradient, attended=None):
    """The loss of the labels, with gradients at them and at the margin before them; written without Selection."""
    targets = align_labels(given["labels"], shifted=True, vocab_size=VOCAB)
    kept = targets.countable.clone()
    for row, place in targets.countable.nonzero().tolist():
        kept[row, max(0, place - MARGIN) : place] = True
    if attended is not None:
        kept &= attended
    coefficients = targets.countable / targets.countable.sum()
    more = {} if attended is None else {"attention_mask": attended.long()}
    loss, _ = reference_loss(
        base, layers, kept, coefficients, targets.tokens, gradient=gradient, input_ids=given["input_ids"], **more
    )
    loss.backward()
    return loss.detach(), gradients(base)


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("gradient", ["kv", "detached"])
def test_equals_the_autograd_reference(gradient, architecture, engine):
    base, given = ROUTABLE[architecture](), batch(0, STRETCHES)
    model = CGGRModel(base, gradient=gradient, selection="supervised", engine=engine, context_margin=MARGIN).train()
    loss, found = backward(model, **given)
    assert int(model.metrics["kept_tokens"]) == 6 + 3 + 2 + 15
    base.zero_grad()
    wanted, expected = reference(base, model._passes.architecture.layers, given, gradient)
    torch.testing.assert_close(loss, wanted)
    assert relative_error(found, expected) <= 1e-6
    without = backward(CGGRModel(base, gradient=gradient, selection="supervised").train(), **given)[1]
    assert relative_error(without, expected) > 1e-3


def test_it_does_not_reach_into_padding():
    base, given = ROUTABLE["llama"](), batch(0, STRETCHES)
    attended = torch.ones_like(given["input_ids"], dtype=torch.bool)
    attended[0, :27] = False
    model = CGGRModel(base, selection="supervised", context_margin=MARGIN).train()
    loss, found = backward(model, **given, attention_mask=attended.long())
    base.zero_grad()
    wanted, expected = reference(base, model._passes.architecture.layers, given, "kv", attended)
    torch.testing.assert_close(loss, wanted)
    assert relative_error(found, expected) <= 1e-6


def test_recorded_steps_have_it(monkeypatch):
    record_at_once(monkeypatch)
    steps = [[batch(n, [[(30, 31 + n)], [(5, 6)], []]), batch(n + 9, STRETCHES, num_items=50)] for n in range(5)]
    found = hold_to_eager(
        ROUTABLE["llama"](), steps, selection="supervised", context_margin=MARGIN, tolerance=1e-6
    )  # fmt: skip
    assert found[-1]


def test_it_is_refused_where_it_would_do_nothing():
    for more in ({}, {"selection": "random"}, {"selection": "supervised", "gradient": "exact"}):
        with pytest.raises(ValueError, match="context_margin=5 requires selection='supervised'"):
            CGGRModel(ROUTABLE["llama"](), context_margin=5, **more)
    with pytest.raises(ValueError, match="context_margin must be at least 0"):
        CGGRModel(ROUTABLE["llama"](), selection="supervised", context_margin=-1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeError, match="within must be a bool tensor"):
        Selection.from_mask(mask, margin=1, within=mask.long())
    with pytest.raises(ValueError, match=r"^margin must be at least 0, got -1"):
        Selection.from_mask(mask, margin=-1)
    with pytest.raises(ValueError, match=r"^within must have shape \(2, 3\) \(that of mask\), got \(2, 1\)"):
        Selection.from_mask(mask, margin=1, within=mask[:, :1])


def test_a_margin_has_no_weight_and_counts_for_nothing():
    mask = torch.tensor([[False, False, True, False, True, True]])
    made = Selection.from_mask(mask, capacity=5, margin=1)
    assert made.index.tolist() == [[1, 2, 3, 4, 5]] and made.valid.all()
    assert made.weight.tolist() == [[0, 2, 0, 2, 2]] and made.ratio == 0.5
    plain = Selection.from_mask(mask, capacity=5)
    assert plain.weight[plain.valid].tolist() == [2, 2, 2] and not plain.weight[~plain.valid].any()
