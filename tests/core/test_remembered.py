"""Remembered scores: what is recalled, what is remembered, and how a model trains with them."""

import copy

import pytest
import torch

import cggr_core.readout
import cggr_core.step.selecting
from cggr_core import CGGRModel, CGGRScorer, token_statistics
from cggr_core.experimental import RememberedScores
from tests.support.model_steps import MODES, ROUTED, backward, tokens
from tests.support.reference_routing import relative_error
from tests.support.tiny_models import ROUTABLE

COUNTABLE = torch.ones(2, 4, dtype=torch.bool)


def remember(memory, ids, score, kept=None):
    """One forward in which ``score`` [R, K] of the first positions was observed."""
    kept = torch.ones(score.shape, dtype=torch.bool) if kept is None else kept
    position = torch.arange(score.shape[1]).expand(score.shape)
    memory.remember(torch.tensor(ids), torch.arange(len(ids)), position, score, kept)


class TestMemory:
    def test_serves_what_was_observed_and_the_mean_for_the_rest(self):
        memory = RememberedScores.empty(examples=5, length=6)
        remember(memory, [3, 1], torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        memory.flush()
        score, metrics = memory.recall(torch.tensor([1, 0]), COUNTABLE)
        assert score.tolist() == [[3.0, 6.0, 4.5, 4.5], [4.5] * 4]
        assert metrics["remembered"] == 2 / 8
        nothing, metrics = memory.recall(torch.tensor([0, 4]), COUNTABLE)
        assert nothing.tolist() == [[1.0] * 4] * 2
        assert metrics["remembered"] == metrics["score_age"] == 0

    def test_only_kept_and_finite_scores_are_remembered(self):
        memory = RememberedScores.empty(examples=2, length=4)
        score = torch.tensor([[1.0, 2.0, float("nan"), 1e9]])
        remember(memory, [1], score, kept=torch.tensor([[True, False, True, True]]))
        assert memory.scores[1].tolist() == [1.0, 0.0, 0.0, 65504.0]
        assert memory.observed[1].tolist() == [0, -1, -1, 0]
        assert memory.observed[0].tolist() == [-1] * 4

    def test_the_age_is_counted_in_forwards_and_epochs(self):
        memory = RememberedScores.empty(examples=4, length=4)
        remember(memory, [0, 1], torch.ones(2, 4))
        remember(memory, [2, 3], torch.ones(2, 4))
        remember(memory, [0, 2], torch.ones(2, 2))
        _, metrics = memory.recall(torch.tensor([0, 1]), COUNTABLE)  # all but what the last forward observed
        assert metrics["remembered"] == 1
        assert metrics["score_age"] == 3
        assert metrics["score_age_epochs"] == 1.5
        memory.flush()
        _, metrics = memory.recall(torch.tensor([0, 1]), COUNTABLE)
        assert metrics["score_age"] == (2 * 1 + 6 * 3) / 8

    def test_uncountable_tokens_do_not_count(self):
        memory = RememberedScores.empty(examples=1, length=4)
        remember(memory, [0], torch.tensor([[1.0, 5.0]]))
        memory.flush()
        countable = torch.tensor([[True, False, True, True]])
        score, metrics = memory.recall(torch.tensor([0]), countable)
        assert score.tolist() == [[1.0, 5.0, 1.0, 1.0]]
        assert metrics["remembered"] == pytest.approx(1 / 3)

    def test_an_example_twice_in_a_batch_keeps_the_later_row(self):
        memory = RememberedScores.empty(examples=1, length=4)
        remember(memory, [0, 0], torch.tensor([[1.0, 1.0], [2.0, 2.0]]), kept=torch.tensor([[True] * 2, [True, False]]))
        assert memory.scores[0].tolist() == [2.0, 1.0, 0.0, 0.0]

    def test_a_copy_waits_for_what_is_under_way(self):
        class Event:
            def synchronize(self):
                pass

            def __reduce__(self):
                raise TypeError("events cannot be copied")

        memory = RememberedScores.empty(examples=2, length=4)
        remember(memory, [1], torch.tensor([[3.0, 2.0]]))
        memory._pending[0] = memory._pending[0]._replace(arrived=Event())
        copied = copy.deepcopy(memory)
        remember(copied, [0], torch.tensor([[5.0, 5.0]]))
        assert copied.scores.tolist() == [[5.0, 5.0, 0.0, 0.0], [3.0, 2.0, 0.0, 0.0]]
        assert memory.scores.tolist() == [[0.0] * 4, [3.0, 2.0, 0.0, 0.0]]

    @pytest.mark.parametrize(
        ("ids", "error", "message"),
        [
            (None, ValueError, "RememberedScores needs example_ids"),
            (torch.tensor([0, 5]), ValueError, r"1 value\(s\) outside \[0, 5\) \(the first is 5\)"),
            (torch.tensor([-1, 0]), ValueError, r"the first is -1"),
            (torch.tensor([0.0, 1.0]), TypeError, r"must be torch\.int64, got torch\.float32"),
            (torch.tensor([0]), ValueError, r"example_ids must have shape \(2,\)"),
            (torch.tensor([0, 1], device="meta"), ValueError, "example_ids must be on the CPU"),
        ],
    )
    def test_wrong_example_ids(self, ids, error, message):
        with pytest.raises(error, match=message):
            RememberedScores.empty(examples=5, length=6).check_ids(ids, (2, 4))

    def test_longer_rows_than_are_remembered(self):
        with pytest.raises(ValueError, match="rows have 7 tokens, but the memory holds only 6"):
            RememberedScores.empty(examples=5, length=6).check_ids(torch.tensor([0]), (1, 7))

    def test_tensors_that_cannot_be_a_memory(self):
        observed = torch.full((2, 4), -1, dtype=torch.int32)
        with pytest.raises(TypeError, match=r"scores must be torch\.float16"):
            RememberedScores(torch.zeros(2, 4), observed)
        with pytest.raises(ValueError, match="observed must have shape"):
            RememberedScores(torch.zeros(2, 5, dtype=torch.float16), observed)
        with pytest.raises(ValueError, match=r"scores must be \[E, L\] on the CPU"):
            RememberedScores(torch.zeros(2, 4, dtype=torch.float16, device="meta"), observed)


def train(memory, model, *, gradient="kv", forwards=1, ids=(4, 0, 2), **settings):
    wrapped = CGGRModel(model, memory, gradient=gradient, min_tokens_ratio=0.4, seed=3, **settings)
    for _ in range(forwards):
        backward(wrapped, tokens(), example_ids=torch.tensor(ids))
    return wrapped


@pytest.mark.parametrize(("gradient", "engine"), [*ROUTED, ("exact", None)])
def test_the_step_is_that_of_the_selection(gradient, engine, monkeypatch):
    made, select = [], cggr_core.step.selecting.select

    def noted(*args, **kwargs):
        made.append(select(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(cggr_core.step.selecting, "select", noted)
    model, memory = ROUTABLE["llama"](), RememberedScores.empty(examples=6, length=20)
    wrapped = train(memory, model, gradient=gradient, engine=engine, selection="sampled", forwards=2)
    loss, found = backward(wrapped, tokens(), example_ids=torch.tensor([4, 0, 2]))
    assert wrapped.metrics["engine"] == (engine or "plain")
    assert wrapped.metrics["score_kept"] != wrapped.metrics["score_dropped"]
    wanted_loss, wanted = backward(CGGRModel(model, gradient=gradient), tokens(), selection=made[-1])
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0)
    assert relative_error(found, wanted) <= 1e-5


@pytest.mark.parametrize("gradient", MODES)
def test_true_scores_are_remembered_where_tokens_were_kept(gradient):
    model, memory = ROUTABLE["llama"](), RememberedScores.empty(examples=6, length=20)
    wrapped = train(memory, model, gradient=gradient, selection="sampled")
    kept = memory.observed[[4, 0, 2], :12] == 0
    assert kept.sum() == wrapped.metrics["kept_tokens"] > 0
    with torch.no_grad():
        logits = model(tokens()).logits[:, :-1]
    truth = token_statistics(logits, tokens()[:, 1:]).gradnorm
    assert not kept[:, 11:].any()
    kept = kept[:, :11]
    torch.testing.assert_close(memory.scores[[4, 0, 2], :11][kept].float(), truth[kept], rtol=2e-3, atol=1e-3)
    assert (memory.observed[[1, 3, 5]] == -1).all()


def test_scores_nothing_before_the_layers(monkeypatch):
    """The one look at the head is that of the kept tokens; every layer runs once on each token."""
    rows, model = [], ROUTABLE["llama"]()
    memory = RememberedScores.empty(examples=6, length=20)
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(args[0][..., 0].numel()))
    wrapped = train(memory, model, forwards=2)
    seen.clear()
    statistics = cggr_core.readout.linear_token_statistics
    monkeypatch.setattr(
        cggr_core.readout,
        "linear_token_statistics",
        lambda hidden, *args, **more: rows.append(hidden[..., 0].numel()) or statistics(hidden, *args, **more),
    )
    backward(wrapped, tokens(), example_ids=torch.tensor([4, 0, 2]))
    assert wrapped.metrics["engine"] == "interleaved"
    slots = 3 * 5
    assert rows == [slots]
    assert sorted(seen) == sorted([slots, 36 - slots])


def test_the_weighted_loss_estimates_the_full_loss_however_old_the_scores_are():
    model, memory = ROUTABLE["llama"](), RememberedScores.empty(examples=6, length=20)
    remember(memory, [4, 0, 2], torch.rand(3, 11) * 5)  # nothing to do with the model
    memory.flush()
    wrapped = CGGRModel(model, memory, gradient="kv", min_tokens_ratio=0.5, selection="sampled")
    with torch.no_grad():
        full = model(input_ids=tokens(), labels=tokens()).loss
        losses = [wrapped(tokens(), labels=tokens(), example_ids=torch.tensor([4, 0, 2])) for _ in range(80)]
    losses = torch.stack(losses)
    assert (losses.mean() - full).abs() <= 4 * losses.std() / 80**0.5
    assert losses.std() > 0


def test_everything_kept_is_remembered_too():
    model, memory = ROUTABLE["llama"](), RememberedScores.empty(examples=6, length=20)
    wrapped = CGGRModel(model, memory, warmup_steps=4)
    backward(wrapped, tokens(), example_ids=torch.tensor([4, 0, 2]))
    assert wrapped.metrics["keep_ratio"] == 1
    assert (memory.observed[[4, 0, 2], :11] == 0).all()
    assert (memory.observed[:, 11:] == -1).all()


@pytest.mark.parametrize(
    ("settings", "inputs", "message"),
    [
        ({}, {}, "RememberedScores needs example_ids"),
        ({}, {"example_ids": torch.tensor([0, 1, 9])}, "the first is 9"),
        ({"router": None}, {"example_ids": torch.tensor([0, 1, 2])}, "example_ids is used only by Remembered"),
        ({"selection": "random"}, {}, "uses no score; leave router=None"),
        ({"dynamic_threshold": True}, {}, "RememberedScores gives only scores"),
    ],
)
def test_misuse(settings, inputs, message):
    memory = RememberedScores.empty(examples=6, length=20)
    with pytest.raises(ValueError, match=message):
        CGGRModel(ROUTABLE["llama"](), **{"router": memory, **settings})(tokens(), labels=tokens(), **inputs)
    assert memory.forwards == 0


def test_not_in_a_scorer():
    with pytest.raises(TypeError, match="a RememberedScores works only in CGGRModel"):
        CGGRScorer(RememberedScores.empty(examples=1, length=1))
