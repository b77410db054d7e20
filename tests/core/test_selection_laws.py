"""The guarantees of the selection, compared with plain-Python computations."""

import math
from fractions import Fraction

import pytest
import torch

from cggr_core import backends, sampling, strategies
from cggr_core.sampling import select_reference
from cggr_core.selection import Selection
from cggr_core.settings import SCOPES, SELECTIONS
from cggr_core.slots import slots_for, slots_in_steps
from cggr_core.strategies import plain_weight, select

WEIGHTED = ("stratified", "sampled", "random")


def rows_of_scores(kind):
    """Rows of different lengths, one of them empty and one of a single token, and large scores that do not count."""
    generator = torch.Generator().manual_seed(3)
    score = torch.randn(7, 45, generator=generator).double().exp() * {"small": 1e-3, "large": 1e3}.get(kind, 1.0)
    if kind == "signed":
        score[:, ::3] *= -1.0
    countable = torch.rand(7, 45, generator=generator) < torch.tensor([0.9, 0.5, 0.2, 0.9, 0.7, 1.0, 0.4])[:, None]
    countable[3], countable[6] = False, False
    countable[6, 17] = True
    score[~countable] = 1e4
    return score.float(), countable


def share(sizes, k):
    """min(1, c * size) with the sum ``k``; c by bisection."""
    if k == len(sizes):
        return [1.0] * k
    low, high = 0.0, k / min(sizes)
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if sum(min(1.0, c * size) for size in sizes) < k else (low, c)
    return [min(1.0, c * size) for size in sizes]


def probabilities(scores, ratio, selection, num_strata, mix):
    """Inclusion probabilities of the countable tokens of one row, as the docstring of ``select`` has them."""
    n = len(scores)
    k = min(n, max(1, round(ratio * n)))
    if selection == "random":
        return [k / n] * n
    sizes = [max(score, 0.0) for score in scores]
    if selection == "stratified":
        order = sorted(range(n), key=lambda i: -scores[i])
        strata = [[] for _ in range(num_strata)]
        for rank, i in enumerate(order):
            strata[rank * num_strata // n].append(i)
        squares = list(sizes)
        for members in strata:
            for i in members:
                sizes[i] = math.sqrt(sum(squares[j] ** 2 for j in members) / len(members))
    mean = sum(sizes) / n
    sizes = [(1 - mix) * size + mix * mean for size in sizes] if mean > 0 else [1.0] * n
    return share(sizes, k)


@pytest.mark.parametrize("kind", ["plain", "signed", "small", "large"])
@pytest.mark.parametrize(
    ("selection", "num_strata"),
    [("random", 4), ("sampled", 4), ("stratified", 1), ("stratified", 4), ("stratified", 7)],
)
def test_a_weight_is_the_inverse_of_the_probability(selection, num_strata, kind):
    score, countable = rows_of_scores(kind)
    for ratio, mix in ((0.3, 0.05), (0.55, 0.4), (0.04, 1.0)):
        expected = torch.zeros(score.shape, dtype=torch.float64)
        for row in range(len(score)):
            scores = score[row, countable[row]].tolist()
            if scores:
                made = probabilities(scores, ratio, selection, num_strata, mix)
                expected[row, countable[row]] = torch.tensor(made, dtype=torch.float64)
        for draw in range(4):
            made = select(
                score,
                countable,
                ratio=ratio,
                selection=selection,
                num_strata=num_strata,
                defensive_mix=mix,
                draw=draw,
            )
            assert made.valid.any(1).tolist() == countable.any(1).tolist()
            weight = made.weight[made.valid].double()
            torch.testing.assert_close(weight, 1 / expected.gather(1, made.index)[made.valid], rtol=1e-6, atol=0)


def test_probabilities_of_many_tokens_are_exact():
    # Sums over 40,000 tokens in float32 would be off by 1e-5 and more.
    score = torch.rand(1, 40_000, generator=torch.Generator().manual_seed(0)) + 0.5
    countable = torch.ones_like(score, dtype=torch.bool)
    made = select(score, countable, ratio=0.25, selection="sampled", defensive_mix=0.0)
    expected = score.double().sum() / (10_000 * made.gather(score)[made.valid].double())
    assert int(made.valid.sum()) == 10_000
    torch.testing.assert_close(made.weight[made.valid].double(), expected, rtol=2e-7, atol=0)


def test_systematic_sampling_has_its_counts_and_probabilities():
    # Over equally spaced starts the share of an entry is its probability, up to one start at either end.
    starts = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    pi = torch.tensor([0.25, 1.0, 0.1, 0.0, 0.65, 0.37, 0.63, 0.9, 0.1, 0.0], dtype=torch.float64)
    many = pi.expand(4000, -1)
    chosen = sampling._systematic(many, torch.full((4000,), 4), starts)
    assert (chosen.sum(1) == 4).all()
    assert ((chosen.double().mean(0) - pi).abs() <= 1.01 / 4000).all()


@pytest.mark.parametrize("start", [2.0**-53, 2.0**-33, 0.3, 0.5, 1.0 - 2.0**-40, 1.0 - 2.0**-53])
def test_systematic_sampling_counts_exactly_from_any_start(start):
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(50, 61, generator=generator, dtype=torch.float64) + 1e-3
    countable = torch.rand(50, 61, generator=generator) < 0.8
    countable[0] = False
    k = sampling.kept_counts(countable, 0.37, 61)
    pi = sampling._inclusion_probabilities(size, countable, k)
    chosen = sampling._systematic(pi, k, torch.full((50,), start, dtype=torch.float64))
    assert torch.equal(chosen.sum(1), k)
    assert not (chosen & ~countable).any()


def test_kept_counts_round_as_python_does():
    # Row i has i countable tokens. In float32 some products would fall on the other side of a half.
    countable = torch.ones(1200, 1200, dtype=torch.bool).tril(-1)
    for ratio in (0.005, 0.07, 0.145, 0.29, 0.35, 0.57, 0.715, 0.985, 1.0):
        made = sampling.kept_counts(countable, ratio, 700)
        assert made.dtype == torch.int64
        assert made.tolist() == [min(n, 700, max(1, round(ratio * n))) for n in range(1200)]


def test_slots_are_the_ceiling_of_the_ratio():
    for percent in range(1, 101):
        for length in (0, 1, 2, 7, 100, 299, 1000):
            exact = math.ceil(Fraction(percent, 100) * length)
            assert slots_for(percent / 100, length) == min(length, max(1, exact))


def test_slots_in_steps_grow_as_documented():
    for count in range(2100):
        step = 8 if count <= 128 else 16 if count <= 256 else 32 if count <= 512 else 64
        expected = next(slots for slots in range(count, count + step) if slots % step == 0)
        assert slots_in_steps(count, 10_000) == expected
        assert slots_in_steps(count, count + 1) == min(count + 1, expected)


@pytest.mark.parametrize("scope", SCOPES)
def test_ties_go_to_the_lower_position(scope):
    score = torch.randint(0, 4, (3, 700), generator=torch.Generator().manual_seed(0)).float()
    countable = torch.rand(3, 700, generator=torch.Generator().manual_seed(1)) < 0.9
    made = select(score, countable, ratio=0.3, selection="topk", scope=scope)
    kept = torch.zeros(3, 700, dtype=torch.bool)
    for rows in [(0, 1, 2)] if scope == "batch" else [(0,), (1,), (2,)]:
        tokens = [(row, at) for row in rows for at in range(700) if countable[row, at]]
        for row, at in sorted(tokens, key=lambda token: -score[token].item())[: round(0.3 * len(tokens))]:
            kept[row, at] = True
    assert torch.equal(made.mask, kept)


@pytest.mark.parametrize("scale", [1.0, -1.0, 5e37])
def test_blocks_are_chosen_by_the_mean_of_what_counts(scale):
    generator = torch.Generator().manual_seed(2)
    score = (torch.rand(4, 50, generator=generator) + 0.1) * scale
    countable = torch.rand(4, 50, generator=generator) < 0.6
    countable[:, 12:16] = False
    score[~countable] = 3e38
    made = select(score, countable, ratio=0.3, selection="topk", block_size=4)
    for row in range(4):
        means = {}
        for block in range(13):
            inside = [at for at in range(4 * block, min(50, 4 * block + 4)) if countable[row, at]]
            if inside:
                means[block] = sum(score[row, at].item() for at in inside) / len(inside)
        best = sorted(means, key=lambda block: -means[block])[: round(0.3 * len(means))]
        assert {at // 4 for at in made.mask[row].nonzero().flatten().tolist()} == set(best)


def test_capacities_with_blocks_are_whole_blocks():
    score, countable = torch.rand(2, 40), torch.ones(2, 40, dtype=torch.bool)
    for capacity, tokens in ((3, 4), (4, 4), (9, 12), (400, 40)):
        made = select(score, countable, ratio=1.0, capacity=capacity, block_size=4)
        assert made.valid.sum(1).tolist() == [tokens, tokens]


def test_the_guarantee_of_sequence_aware_widens_its_own_slots_alone():
    score, countable = torch.rand(3, 40), torch.ones(3, 40, dtype=torch.bool)

    def slots(selection, **settings):
        made = select(score, countable, ratio=0.1, selection=selection, min_tokens_per_sequence=9, **settings)
        return made.index.shape[1], made.valid.sum().item()

    assert slots("sequence_aware") == (9, 27)
    assert slots("sequence_aware", scope="batch") == (27, 27)
    assert slots("sequence_aware", capacity=5) == (5, 15)
    assert slots("sequence_aware", scope="batch", capacity=20) == (20, 20)
    assert slots("topk") == slots("stratified") == (4, 12)
    assert slots("topk", capacity=20) == slots("stratified", capacity=20) == (20, 12)
    made = select(score, countable, ratio=0.01, selection="sequence_aware", capacity=5)
    assert made.valid.sum(1).tolist() == [1, 1, 1]
    # Four blocks of 8 positions hold the 9 wanted: two of them.
    assert slots("sequence_aware", block_size=8) == (16, 48)


def test_plain_weights_by_hand():
    countable = torch.tensor([[True, True, True, False], [True, True, True, True], [False, False, False, False]])
    valid = torch.tensor([[True, False], [True, True], [False, False]])
    assert plain_weight(countable, valid).tolist() == [[3.0, 0.0], [2.0, 2.0], [0.0, 0.0]]


def test_a_mask_with_one_token_or_none():
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 4] = True
    made = Selection.from_mask(mask)
    assert made.weight.sum() == 18.0
    assert made.ratio == pytest.approx(1 / 18)
    assert Selection.from_mask(mask[:, :1], countable=torch.tensor([[True], [False]])).ratio == 0.0
    assert Selection.from_mask(mask, countable=mask).ratio == 1.0
    assert Selection.from_mask(mask & False, countable=mask & False).ratio == 0.0


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("doubles")
def test_weights_and_ratio_are_float32_whatever_the_default_is():
    score, countable = torch.rand(2, 20), torch.ones(2, 20, dtype=torch.bool)
    weight = torch.rand(2, 20)
    made = [
        *(
            select(score, countable, ratio=0.3, selection=selection, block_size=block_size, unbiased=unbiased)
            for selection in SELECTIONS
            for block_size in (1, 4)
            for unbiased in (True, False)
        ),
        Selection.from_mask(score > 0.5),
        Selection.from_mask(score > 0.5, weight=weight),
    ]
    for each in made:
        assert each.weight.dtype == each.ratio.dtype == torch.float32
        assert each.index.is_contiguous()


def test_ops_get_plain_float32_scores(monkeypatch):
    seen = []

    def kernel(score, *arguments):
        seen.append((score.dtype, score.requires_grad))
        return sampling.select_reference(score, *arguments)

    monkeypatch.setitem(backends._registry.kernels, ("select", "cpu"), ("test", kernel))
    countable = torch.ones(1, 8, dtype=torch.bool)
    select(torch.rand(1, 8, dtype=torch.float64, requires_grad=True), countable, ratio=0.5)
    select(torch.rand(1, 8, dtype=torch.bfloat16), countable, ratio=0.5, block_size=2)
    assert seen == [(torch.float32, False)] * 2


def test_nan_is_the_lowest_score_where_values_are_not_read(monkeypatch):
    monkeypatch.setattr(strategies, "values_are_free", lambda tensor: False)
    score = torch.tensor([[-1.0, float("nan"), -2.0, -float("inf")]])
    made = select(score, torch.ones(1, 4, dtype=torch.bool), ratio=0.5, selection="topk")
    assert made.index.tolist() == [[0, 2]]


def test_random_keeps_every_subset_alike():
    many, countable = torch.zeros(6000, 5), torch.tensor([[True, True, False, True, True]]).expand(6000, -1)
    made = select(many, countable, ratio=0.5, selection="random", seed=11)
    subsets = made.mask.int() @ torch.tensor([1, 2, 4, 8, 16], dtype=torch.int32)
    counts = torch.bincount(subsets, minlength=32)
    assert counts.count_nonzero() == 6
    assert ((counts[counts > 0] - 1000).abs() < 5 * 1000**0.5).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": [True]}, TypeError, "^mask must be a bool tensor, got list"),
        ({"countable": torch.ones(2, 4)}, TypeError, "^countable must be a bool tensor, got torch.float32"),
        ({"countable": torch.ones(2, 3).bool()}, ValueError, r"^countable must have shape \(2, 4\) \(that of mask\)"),
        ({"countable": torch.ones(2, 4, device="meta").bool()}, ValueError, "^countable is on meta but mask is on cpu"),
        ({"weight": torch.ones(2, 4).int()}, TypeError, "^weight must have a floating dtype"),
        ({"weight": torch.ones(2, 3)}, ValueError, r"^weight must have shape \(2, 4\) \(that of mask\)"),
        ({"weight": torch.ones(2, 4, device="meta")}, ValueError, "^weight is on meta but mask is on cpu"),
        ({"capacity": -1}, ValueError, "^capacity must be at least 0, got -1"),
        ({"capacity": 1.5}, TypeError, "^capacity must be an integer"),
    ],
)
def test_bad_arguments_of_from_mask(arguments, error, message):
    with pytest.raises(error, match=message):
        Selection.from_mask(**{"mask": torch.ones(2, 4, dtype=torch.bool), **arguments})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"min_tokens_per_sequence": -1}, ValueError, "min_tokens_per_sequence must be at least 0, got -1"),
        ({"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ({"first_row": -1}, ValueError, "first_row must be at least 0, got -1"),
        ({"defensive_mix": -0.1}, ValueError, "defensive_mix must be"),
        ({"defensive_mix": float("nan")}, ValueError, "defensive_mix must be"),
        ({"score": torch.ones(2, 5).int()}, TypeError, "^score must have a floating dtype"),
        (
            {"countable": torch.ones(2, 5, device="meta").bool()},
            ValueError,
            "^countable is on meta but score is on cpu",
        ),
    ],
)
def test_more_bad_arguments_of_select(change, error, message):
    arguments = {"score": torch.rand(2, 5), "countable": torch.ones(2, 5, dtype=torch.bool), "ratio": 0.5, **change}
    with pytest.raises(error, match=message):
        select(**arguments)


def test_gather_names_the_shape_it_wants():
    made = select(torch.rand(2, 5), torch.ones(2, 5, dtype=torch.bool), ratio=0.5)
    with pytest.raises(ValueError, match=r"^tensor must have shape \(2, 5\) \(that of the score\), got \(2, 4\)$"):
        made.gather(torch.zeros(2, 4, 3))
    column = torch.rand(2, 5, 1)
    assert torch.equal(made.gather(column), made.gather(column[:, :, 0])[:, :, None])
    empty = select(torch.zeros(0, 5), torch.zeros(0, 5, dtype=torch.bool), ratio=0.5)
    assert empty.gather(torch.zeros(0, 5, 2)).shape == (0, 3, 2)


@pytest.mark.parametrize("strategy", ["topk", "random", "sampled"])
@pytest.mark.parametrize("rows", [(9, 5), (0, 7), (0, 0)])
def test_without_probabilities_the_op_weights_all_kept_tokens_alike(strategy, rows):
    """By how many countable tokens one of them stands for, in the whole batch."""
    score, places = torch.rand(2, 12), torch.arange(12).expand(2, 12)
    countable = places < torch.tensor(rows)[:, None]
    _, valid, weight = select_reference(score, countable, 0.4, strategy, 6, 4, 1, False, 0, 0, 0.05)
    kept = sum(max(1, round(0.4 * n)) for n in rows if n)
    assert valid.sum() == kept
    torch.testing.assert_close(weight, valid * (sum(rows) / max(kept, 1)))
