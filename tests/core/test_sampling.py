"""The reference of the op ``select``: counts, probabilities and weights where nothing else was asked for."""

import pytest
import torch

from cggr_core.backends import resolve
from cggr_core.sampling import kept_counts, select_reference

EVERY = torch.ones(2, 40, dtype=torch.bool)
SETTINGS = {"num_strata": 4, "min_tokens": 1, "unbiased": True, "seed": 0, "draw": 0, "defensive_mix": 0.0}


def chosen(score, ratio, strategy, capacity, **settings):
    return select_reference(score, EVERY, ratio, strategy, capacity, **{**SETTINGS, **settings})


def test_a_row_with_countable_tokens_keeps_at_least_one():
    countable = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert kept_counts(countable, 0.01, 3).tolist() == [1, 1, 0]
    assert kept_counts(countable, 0.01, 3, at_least=2).tolist() == [2, 1, 0]
    assert kept_counts(countable, 0.7, 3).tolist() == [2, 1, 0] and kept_counts(countable, 1.0, 2)[0] == 2


@pytest.mark.parametrize("strategy", ["random", "sampled", "stratified"])
def test_rows_are_numbered_from_zero(strategy):
    score = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    first, same, later = (chosen(score, 0.3, strategy, 12, **more) for more in ({}, {"first_row": 0}, {"first_row": 1}))
    assert torch.equal(first[0], same[0]) and not torch.equal(first[0], later[0])
    # A row's draws depend on its number alone.
    assert torch.equal(chosen(score.flip(0), 0.3, strategy, 12, first_row=1)[0][0], first[0][1])


@pytest.mark.parametrize("strategy", ["topk", "random", "sampled", "stratified"])
def test_a_least_number_of_tokens_is_for_whole_sequences_alone(strategy):
    score = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    assert chosen(score, 0.05, strategy, 12, min_tokens=9)[1].sum(1).tolist() == [2, 2]
    assert chosen(score, 0.05, "sequence_aware", 12, min_tokens=9)[1].sum(1).tolist() == [9, 9]


def test_a_token_without_a_score_is_next_to_never_sampled():
    score = torch.zeros(2, 40)
    score[0, 3] = score[1, 7] = 1.0
    for draw in range(20):
        index, valid, weight = chosen(score, 0.025, "sampled", 1, draw=draw)
        assert index.tolist() == [[3], [7]] and valid.all()
        torch.testing.assert_close(weight, torch.ones(2, 1))


@pytest.mark.parametrize("ratio", [0.0125, 0.5])
def test_plain_weights_make_up_for_the_tokens_that_are_left_out(ratio):
    countable = torch.zeros(1, 80, dtype=torch.bool)
    countable[0, :60] = True
    _, valid, weight = select_reference(torch.rand(1, 80), countable, ratio, "topk", 40, **SETTINGS)
    kept = int(valid.sum())
    assert kept == (1 if ratio < 0.1 else 30)
    assert weight[valid].tolist() == pytest.approx([60 / kept] * kept) and not weight[~valid].any()


def test_it_is_the_reference_of_the_op():
    assert resolve("select", "cpu", torch.float64) is select_reference
