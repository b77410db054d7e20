"""The head of a learned router by itself: what it learns, from what, and what is saved."""

import copy
import io

import pytest
import torch
from torch import nn

from cggr_core import select
from cggr_core.experimental import LearnedRouter

HIDDEN, EMBEDDING = 16, 12


def attached(embedding_size: int = EMBEDDING, **settings) -> LearnedRouter:
    router = LearnedRouter(1, **{"width": 8, **settings})
    router.attach(layers=4, hidden_size=HIDDEN, embedding_size=embedding_size)
    return router


def batch(size: int = 256, seed: int = 0, embedding_size: int = EMBEDDING):
    """Hidden states, embeddings, and a score that is the product of a feature of each, around 3."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(size, HIDDEN, generator=generator)
    target = torch.randn(size, embedding_size, generator=generator)
    return hidden, target, 3.0 + hidden[:, 0] * target[:, 0]


def test_learns_a_score_that_depends_on_both_inputs():
    router = attached(width=16, learning_rate=1e-2)
    correlations = []
    for step in range(150):
        hidden, target, score = batch(seed=step)
        correlations.append(router.learn(hidden, target, score, torch.ones(256))["router_correlation"].item())
    assert correlations[0] == 0.0, "before anything was observed all predictions are alike"
    assert sum(correlations[-20:]) / 20 > 0.8
    hidden, target, score = batch(seed=1000)
    predicted = router(hidden, target)
    assert predicted.dtype == torch.float32
    assert (predicted - score).square().mean() < 0.5 * score.var()


@pytest.mark.parametrize("embedding_size", [HIDDEN, EMBEDDING])
def test_a_few_steps_suffice_where_the_target_agrees_with_the_hidden_state(embedding_size):
    """As in a model whose head is its embedding: the likelier the target, the lower the score."""
    router, found = attached(embedding_size), []
    for step in range(20):
        hidden, target, _ = batch(seed=step, embedding_size=embedding_size)
        score = torch.sigmoid(-(hidden[:, :EMBEDDING] * target[:, :EMBEDDING]).sum(1))
        found.append(router.learn(hidden, target, score, torch.ones(256))["router_correlation"])
    assert (found[-1] > 0.7) == (embedding_size == HIDDEN)


@pytest.mark.parametrize("embedding_size", [HIDDEN, EMBEDDING])
def test_the_scale_of_the_embeddings_is_nothing_to_it(embedding_size):
    routers = attached(embedding_size), attached(embedding_size)
    for step in range(3):
        hidden, target, score = batch(seed=step, embedding_size=embedding_size)
        for router, scale in zip(routers, (1.0, 64.0), strict=True):
            router.learn(hidden, scale * target, score, torch.ones(256))
    one, other = routers[0](hidden, target), routers[1](hidden, 64.0 * target)
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)


def test_predictions_are_those_of_averaged_weights():
    router = attached()
    before = [value.clone() for value in router.averaged.parameters()]
    router.learn(*batch(), torch.ones(256))
    for average, start, value in zip(router.averaged.parameters(), before, router.head.parameters(), strict=True):
        torch.testing.assert_close(average, start + (value - start) * 10 / 11)
    router.updates.fill_(10_000)
    before = [value.clone() for value in router.averaged.parameters()]
    router.learn(*batch(seed=1), torch.ones(256))
    for average, start, value in zip(router.averaged.parameters(), before, router.head.parameters(), strict=True):
        torch.testing.assert_close(average, start + (value - start) * 0.02)


def test_the_scale_of_the_scores_is_that_of_the_predictions():
    router = attached()
    hidden, target, score = batch()
    assert torch.equal(router(hidden, target), torch.zeros(256))
    router.learn(hidden, target, 100.0 + 5.0 * score, torch.ones(256))
    assert (router(hidden, target).mean() - 115.0).abs() < 1.0


def test_weights_correct_for_the_selection(monkeypatch):
    """Over many draws of kept tokens, the weighted gradient is that of all tokens."""
    monkeypatch.setattr("cggr_core.experimental.learned_router._UPDATES", 1)
    hidden, target, score = batch(64)
    countable = torch.ones(1, 64, dtype=torch.bool)

    def movement(draw: int | None, weighted: bool = True) -> torch.Tensor:
        router = attached()
        router.learn(hidden, target, score, torch.ones(64))
        router.moments.mul_(1e6)  # what is observed from here on does not move the scale
        chosen, weight = slice(None), torch.ones(64)
        if draw is not None:
            kept = select(score[None].abs(), countable, ratio=0.25, selection="sampled", draw=draw)
            chosen, weight = kept.index[0], kept.weight[0]
            weight = weight if weighted else torch.full_like(weight, 4.0)
        found = []
        router._step = lambda parameters, gradients: found.append(torch.cat([part.flatten() for part in gradients]))
        router.learn(hidden[chosen], target[chosen], score[chosen], weight)
        return found[0] * weight.sum() / 64  # the loss is divided by the sum of the weights

    def errors_in_standard_errors(weighted: bool) -> torch.Tensor:
        draws = torch.stack([movement(draw, weighted) for draw in range(120)])
        return (draws.mean(0) - movement(None)).abs() / (draws.std(0) / 120**0.5 + 1e-6)

    assert errors_in_standard_errors(weighted=True).max() <= 4.5
    assert errors_in_standard_errors(weighted=False).max() > 10


def test_what_does_not_count_teaches_nothing():
    hidden, target, score = batch()
    weight = torch.ones(256)
    weight[::2] = 0.0
    whole, part = attached(), attached()
    spoiled = score.clone()
    spoiled[::2] = torch.tensor([float("nan"), float("inf")]).repeat(64)
    for _ in range(3):
        part.learn(hidden[1::2], target[1::2], score[1::2], torch.ones(128))
        whole.learn(hidden, target, spoiled, weight)
    torch.testing.assert_close(whole(hidden, target), part(hidden, target))
    nothing = attached()
    found = nothing.learn(hidden, target, spoiled, torch.zeros(256))
    assert found["router_correlation"] == 0
    assert torch.equal(nothing(hidden, target), torch.zeros(256))


def test_a_score_that_does_not_vary():
    router = attached()
    hidden, target, _ = batch()
    for _ in range(3):
        found = router.learn(hidden, target, torch.full((256,), 7.0), torch.ones(256))
    assert found["router_correlation"] == 0
    torch.testing.assert_close(router(hidden, target), torch.full((256,), 7.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("updates", [0, 3])
def test_state_round_trip(updates):
    """Saved to a file with the optimizer's moments, the copy continues like the original."""
    router = attached(learning_rate=1e-2)
    for step in range(updates):
        router.learn(*batch(seed=step), torch.ones(256))
    file = io.BytesIO()
    torch.save(router.state_dict(), file)
    file.seek(0)
    again = attached(seed=5, learning_rate=1e-2)
    again.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(router)
    for step in range(updates, updates + 3):
        for other in (router, again, copied):
            other.learn(*batch(seed=step), torch.ones(256))
    hidden, target, _ = batch(seed=99)
    assert torch.equal(router(hidden, target), again(hidden, target))
    assert torch.equal(router(hidden, target), copied(hidden, target))


def test_low_precision_inputs_are_learned_from_in_float32():
    router = attached()
    hidden, target, score = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        router.learn(hidden.bfloat16(), target.bfloat16(), score, torch.ones(256))
        predicted = router(hidden.bfloat16(), target.bfloat16())
    assert predicted.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in router.parameters())


def test_the_same_seed_makes_the_same_weights_and_draws_from_no_one_else():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second, other = attached(seed=1), attached(seed=1), attached(seed=2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"depth": 0}, ValueError, "depth must be at least 1"),
        ({"depth": 1.5}, TypeError, "depth must be an integer"),
        ({"depth": 1, "width": 0}, ValueError, "width must be at least 1"),
        ({"depth": 1, "learning_rate": -1.0}, ValueError, "learning_rate must be a finite number of at least 0"),
        ({"depth": 1, "observed_tokens": 0}, ValueError, "observed_tokens must be at least 1"),
    ],
)
def test_settings(settings, error, message):
    with pytest.raises(error, match=message):
        LearnedRouter(**settings)


def test_a_model_that_does_not_fit():
    router = attached()
    router.attach(layers=4, hidden_size=HIDDEN, embedding_size=EMBEDDING)
    with pytest.raises(ValueError, match="create one LearnedRouter per model"):
        router.attach(layers=4, hidden_size=HIDDEN + 1, embedding_size=EMBEDDING)
    with pytest.raises(ValueError, match=r"depth=4.* but the model has only 4"):
        LearnedRouter(4).attach(layers=4, hidden_size=HIDDEN, embedding_size=EMBEDDING)
    with pytest.raises(ValueError, match="the router has no weights yet"):
        LearnedRouter(1)(torch.zeros(1, HIDDEN), torch.zeros(1, EMBEDDING))
    with pytest.raises(ValueError, match=r"weights were cast to torch\.bfloat16"):
        nn.Sequential(router).bfloat16()[0](torch.zeros(1, HIDDEN), torch.zeros(1, EMBEDDING))
