"""Steps that keep the supervised tokens, recorded on the CPU: one recording for each rounded number of slots."""

import math

import pytest
import torch

from cggr_core import CGGRModel, Selection
from cggr_core.coefficients import loss_coefficients
from cggr_core.slots import slots_in_buckets, slots_in_steps
from cggr_core.step import selecting
from cggr_core.targets import align_labels
from tests.support.model_steps import backward, tokens
from tests.support.recorded_steps import hold_to_eager, record_at_once, recording_model, replayed
from tests.support.reference_routing import gradients, reference_loss, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB

LENGTH = 60


@pytest.fixture(autouse=True)
def _recorded_at_once(monkeypatch):
    record_at_once(monkeypatch)


def batch(seed: int, counts: tuple[int, ...], *, length: int = LENGTH, **more) -> dict:
    """Rows whose last tokens are supervised, with the given numbers."""
    input_ids = tokens(rows=len(counts), length=length, seed=seed)
    left_out = torch.arange(length) < length - torch.tensor(counts)[:, None]
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(left_out, -100), **more}


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient": "kv"},
        {"gradient": "kv", "engine": "two_pass"},
        {"gradient": "detached"},
        {"gradient": "exact"},
    ],
)
def test_the_numbers_of_the_steps_as_they_are(settings):
    """Counts that change with every micro-batch, of two buckets and of rows without any; clipped, accumulated."""
    counts = [(16, 3, 9), (9, 1, 0), (30, 2, 32), (12, 13, 14), (17, 32, 0), (0, 0, 10), (20, 20, 20)]
    steps = [[batch(2 * n, few), batch(2 * n + 1, (5, *few[1:]), num_items=20 + n)] for n, few in enumerate(counts)]
    found = hold_to_eager(ROUTABLE["llama"](), steps, selection="supervised", tolerance=1e-6, **settings)
    assert found[-2:] == [True] * 2


def test_full_buckets_are_the_steps_as_they_are_bit_for_bit():
    steps = [[batch(step, (16, 16 - step, 3))] for step in range(4)]
    assert hold_to_eager(ROUTABLE["llama"](), steps, selection="supervised", tolerance=0.0)[-2:] == [True] * 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("gradient", ["kv", "detached"])
def test_equals_the_autograd_reference(gradient, architecture):
    """Slots without a kept token have zero weight, and gradients do not pass through them."""
    base = ROUTABLE[architecture]()
    model = recording_model(base, gradient=gradient, selection="supervised")
    for seed in range(3):
        backward(model, **batch(seed, (14, 9, 2)))
    given = batch(7, (3, 0, 10))
    loss, found = backward(model, **given)
    assert replayed(model)
    targets = align_labels(given["labels"], shifted=True, vocab_size=VOCAB)
    kept = Selection.from_mask(targets.countable, countable=targets.countable, capacity=10)
    coefficients = torch.zeros(3, LENGTH).scatter_add_(1, kept.index, loss_coefficients(kept, targets.countable))
    wanted, _ = reference_loss(
        base,
        model._passes.architecture.layers,
        kept.mask,
        coefficients,
        targets.tokens,
        gradient=gradient,
        input_ids=given["input_ids"],
    )
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach())
    assert relative_error(found, gradients(base)) <= 1e-6


def test_one_recording_serves_a_bucket():
    model = recording_model(ROUTABLE["llama"](), selection="supervised")
    for seed, most in enumerate((1, 5, 16, 9, 17, 20, 32, 25)):
        backward(model, **batch(seed, (most, 0, 1)))
    assert replayed(model)
    assert model._recorder.recordings == 2


def test_a_recording_serves_up_to_a_third_fewer_slots_and_gives_way_to_a_larger_one():
    """80 and 96 slots are of one kind; a recording of 80 is replaced by one of 96, which then serves both."""
    model, eager = (build(ROUTABLE["llama"](), selection="supervised") for build in (recording_model, CGGRModel))
    found = []
    for seed, most in enumerate((65, 70, 70, 90, 90, 65, 90)):
        given = batch(seed, (most, 0, 1), length=128)
        loss, gradient = backward(model, **given)
        wanted = backward(eager, **given)
        torch.testing.assert_close(loss, wanted[0])
        assert relative_error(gradient, wanted[1]) <= 1e-6
        found.append(replayed(model))
    assert found == [False, False, True, False, True, True, True]
    assert model._recorder.recordings == 1


def test_slots_come_in_few_numbers():
    most = 2000
    for made, of_buckets in ((slots_in_steps, False), (slots_in_buckets, True)):
        # From a number of tokens on, up to the next power of two, multiples of a step.
        steps = (
            ((1, 16), (129, 32), (257, 64), (513, 128), (1025, 256))
            if of_buckets
            else ((1, 8), (129, 16), (257, 32), (513, 64))
        )
        for number in range(1, most):
            step = max(step for start, step in steps if start <= number)
            assert made(number, most) == min(most, math.ceil(number / step) * step)
            assert made(number, number + 1) in (number, number + 1)


@pytest.mark.parametrize("settings", [{}, {"engine": "two_pass"}, {"gradient": "exact"}])
def test_labels_are_counted_once_and_before_anything_is_run(settings, monkeypatch):
    """On a device, this is the only read of a step; it waits for everything queued before it."""
    model, seen = CGGRModel(ROUTABLE["llama"](), selection="supervised", **settings), []
    model.model.model.embed_tokens.register_forward_pre_hook(lambda *args: seen.append("run"))
    for _ in range(4):  # a model with a hook is compared at powers of two
        backward(model, **batch(0, (5, 5, 5)))
    seen.clear()
    count, from_mask = selecting.supervised_slots, Selection.from_mask
    monkeypatch.setattr(
        "cggr_core.model.supervised_slots", lambda *args, **more: seen.append("count") or count(*args, **more)
    )

    def told(mask, *, capacity, **given):
        seen.append(capacity)
        return from_mask(mask, capacity=capacity, **given)

    monkeypatch.setattr(Selection, "from_mask", told)
    given = batch(1, (3, 20, 0))
    backward(model, **given)
    assert seen[0] == "count"
    assert [what for what in seen if what != "run"] == ["count", slots_in_steps(20, LENGTH)]
    shifted = torch.cat([given["labels"][:, 1:], torch.full((3, 1), -100)], dim=1)
    backward(model, given["input_ids"], labels=torch.full_like(shifted, -100), shift_labels=shifted)
    assert [what for what in seen if isinstance(what, int)] == [slots_in_steps(20, LENGTH)] * 2
