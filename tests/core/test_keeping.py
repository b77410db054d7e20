import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cggr_core import keep_nonzero, keep_random, keep_tokens, keep_top_entropy


def mask(rows=4, length=20, seed=0):
    return torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.6


def test_keep_tokens_moves_a_mask_to_the_predicting_positions():
    tokens = torch.tensor([[True, False, True, True], [False, True, False, False]])
    assert keep_tokens(tokens).tolist() == [[False, True, True, False], [True, False, False, False]]


@given(st.integers(0, 99), st.sampled_from([0.05, 0.2, 0.5, 1.0]), st.sampled_from(["batch", "row"]))
def test_top_entropy_is_the_highest_of_the_mask(seed, ratio, scope):
    chosen_from, entropy = mask(seed=seed), torch.rand(4, 20, generator=torch.Generator().manual_seed(seed + 1))
    keep = keep_top_entropy(entropy, chosen_from, ratio, scope=scope)
    assert not (keep & ~chosen_from).any()
    groups = [(keep, chosen_from, entropy)] if scope == "batch" else list(zip(keep, chosen_from, entropy, strict=True))
    for kept, candidates, values in groups:
        n = int(candidates.sum())
        assert int(kept.sum()) == min(n, max(1, round(ratio * n)))
        if kept.any() and (candidates & ~kept).any():
            assert values[kept].min() >= values[candidates & ~kept].max()


def test_random_weights_are_unbiased():
    chosen_from = mask()
    values = torch.randn(4, 20)
    total = (values * chosen_from).sum()
    draws = 400
    estimates = []
    for draw in range(draws):
        kept = keep_random(chosen_from, 0.3, seed=1, draw=draw)
        weight = torch.zeros(4, 20).scatter(1, kept.index, kept.weight)
        assert not (kept.mask & ~chosen_from).any()
        estimates.append((values * weight).sum())
    error = torch.stack(estimates)
    assert (error.mean() - total).abs() <= 4 * error.std() / draws**0.5


def test_random_slots_are_a_share_of_the_fullest_row_in_steps():
    chosen_from = torch.zeros(3, 1000, dtype=torch.bool)
    chosen_from[0, 100:300] = True
    chosen_from[1, 500:] = True
    kept = keep_random(chosen_from, 0.2)
    assert kept.index.shape == (3, 104)
    assert kept.valid.sum(1).tolist() == [40, 100, 0]
    assert keep_random(chosen_from, 0.2, capacity=150).index.shape == (3, 150)


def test_random_does_not_depend_on_the_rows_beside():
    chosen_from = mask(6, 30)
    whole = keep_random(chosen_from, 0.4, seed=3, draw=5).mask
    half = keep_random(chosen_from[3:], 0.4, seed=3, draw=5, first_row=3).mask
    assert (whole[3:] == half).all()


def test_nonzero_advantages_of_rows_and_of_tokens():
    chosen_from = mask()
    rows = torch.tensor([0.0, 1.0, -0.5, 0.0])
    assert (keep_nonzero(rows, chosen_from) == (chosen_from & (rows != 0)[:, None])).all()
    tokens = torch.randn(4, 20) * (torch.rand(4, 20) < 0.5)
    assert (keep_nonzero(tokens, chosen_from) == (chosen_from & (tokens != 0))).all()


def test_errors_name_the_argument():
    with pytest.raises(
        TypeError, match=r"mask must be a bool tensor, got torch.int64; use mask.bool\(\); .* labels != -100"
    ):
        keep_tokens(torch.ones(2, 3).long())
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
        keep_random(mask(), 0.0)
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 19\)"):
        keep_top_entropy(torch.rand(4, 19), mask(), 0.5)
    with pytest.raises(ValueError, match="scope must be one of 'row', 'batch'"):
        keep_top_entropy(torch.rand(4, 20), mask(), 0.5, scope="rank")
    with pytest.raises(ValueError, match=r"advantages must have shape \(4, 20\) .*or \[B\]"):
        keep_nonzero(torch.rand(5), mask())
    with pytest.raises(TypeError, match="advantages must have a floating dtype"):
        keep_nonzero(torch.ones(4).long(), mask())
    with pytest.raises(ValueError, match="advantages has 1 NaN of 4 values"):
        keep_nonzero(torch.tensor([1.0, float("nan"), 0.0, 1.0]), mask())
