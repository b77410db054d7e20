import pytest
import torch

from cggr_core.sampling import select_reference
from cggr_kernels.select import STRATEGIES, select


def problem(B, S, device, *, ties=False):
    generator = torch.Generator().manual_seed(B * 1000 + S)
    score = torch.rand(B, S, generator=generator) ** 3
    if ties:
        score = (score * 4).round()
    countable = torch.rand(B, S, generator=generator) < 0.9
    return score.to(device), countable.to(device)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("B", "S"), [(1, 1), (3, 7), (2, 257), (1, 2500)])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_the_reference(strategy, B, S, ties, device):
    score, countable = problem(B, S, device, ties=ties)
    capacity = -(-S // 3)
    for seed, draw, ratio in ((0, 0, 0.3), (-5, 7, 0.05), (2**63 + 11, 3, 0.33)):
        for unbiased in (True, False):
            rest = (ratio, strategy, capacity, 4, 2, unbiased, seed, draw, 0.05, 9 * draw)
            index, valid, weight = select(score, countable, *rest)
            expected = select_reference(score, countable, *rest)
            assert torch.equal(index, expected[0])
            assert torch.equal(valid, expected[1])
            torch.testing.assert_close(weight, expected[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_numbers_may_be_on_the_device(strategy, device):
    score, countable = problem(3, 257, device)
    settings = {"ratio": 0.3, "strategy": strategy, "capacity": 90, "seed": 5}
    expected = select(score, countable, **settings, draw=7, first_row=5)
    draw, first_row = (torch.tensor(number, device=device) for number in (7, 5))
    for value, wanted in zip(
        select(score, countable, **settings, draw=draw, first_row=first_row), expected, strict=True
    ):
        assert torch.equal(value, wanted)
    with pytest.raises(TypeError, match="first_row must be an int or a 0-dim int64 tensor"):
        select(score, countable, **settings, first_row=first_row.float())


@pytest.mark.parametrize("strata", [1, 3, 16])
@pytest.mark.parametrize("kind", ["zero", "equal", "one large", "negative"])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_stratified_at_its_edges(strata, kind, ratio, device):
    score = {
        "zero": torch.zeros(2, 50),
        "equal": torch.full((2, 50), 3.0),
        "one large": torch.cat([torch.full((2, 1), 1e6), torch.rand(2, 49)], 1),
        "negative": torch.linspace(-3, 2, 100).reshape(2, 50),
    }[kind].to(device)
    countable = torch.ones(2, 50, dtype=torch.bool, device=device)
    countable[1, 5:] = False
    for mix in (0.0, 0.05, 1.0):
        rest = (ratio, "stratified", 50, strata, 1, True, 1, 0, mix)
        index, valid, weight = select(score, countable, *rest)
        assert valid.sum(1).tolist() == [round(50 * ratio), max(1, round(5 * ratio))]
        for value, expected in zip((index, valid, weight), select_reference(score, countable, *rest), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_without_countable_tokens(strategy, device):
    score, _ = problem(2, 30, device)
    countable = torch.zeros(2, 30, dtype=torch.bool, device=device)
    countable[0, 4] = True
    index, valid, weight = select(score, countable, 0.5, strategy, 15)
    assert valid.sum(1).tolist() == [1, 0]
    assert index[0][valid[0]].tolist() == [4]
    assert (weight[1] == 0).all()
    assert (index.diff(dim=1) > 0).all()


def test_the_draw_may_live_on_the_device(device):
    score, countable = problem(2, 100, device)
    for strategy in ("stratified", "sampled", "random"):
        on_host = select(score, countable, 0.3, strategy, 30, draw=5)
        on_device = select(score, countable, 0.3, strategy, 30, draw=torch.tensor(5, device=device))
        for value, same in zip(on_host, on_device, strict=True):
            assert torch.equal(value, same)


@pytest.mark.parametrize("strategy", ["stratified", "sampled", "random"])
def test_weights_are_unbiased(strategy, device):
    """Weighted sums over many draws of one score vector: of the scores, and of values unrelated to them."""
    score, countable = problem(1, 24, device)
    values = torch.stack([score[0], torch.rand(24, generator=torch.Generator().manual_seed(1)).to(device)])
    full = (values * countable[0]).sum(1)
    rows = 120  # every row draws for itself
    index, _, weight = select(score.expand(rows, -1), countable.expand(rows, -1), 0.4, strategy, 10)
    sums = (weight * values[:, index]).sum(2)
    assert ((sums.mean(1) - full).abs() <= 4.5 * sums.std(1) / rows**0.5 + 1e-3).all()


def test_bad_input_is_named(device):
    score, countable = problem(2, 30, device)
    with pytest.raises(TypeError, match="score must be float32"):
        select(score.double(), countable, 0.5)
    with pytest.raises(ValueError, match="must both be"):
        select(score, countable[:1], 0.5)
    with pytest.raises(TypeError, match="draw must be"):
        select(score, countable, 0.5, draw=torch.tensor([1], device=device))
    for name, value in {
        "ratio": 0.0,
        "strategy": "best",
        "capacity": 31,
        "num_strata": 0,
        "defensive_mix": 2.0,
    }.items():
        with pytest.raises(ValueError, match=name):
            select(score, countable, **{"ratio": 0.5, name: value})


def test_op_registration(device):
    score, countable = problem(2, 30, device)
    draw, first_row = (torch.tensor(number, device=device) for number in (3, 2))
    for strategy in STRATEGIES:
        arguments = (score, countable, 0.5, strategy, 15, 4, 1, True, 0, draw, 0.05, first_row)
        torch.library.opcheck(torch.ops.cggr_kernels.select.default, arguments)


def test_compiles_as_one_graph(device, compiler):
    score, countable = problem(2, 30, device)
    compiled = torch.compile(lambda s, c: select(s * 1.0, c, 0.5, "stratified", 15), fullgraph=True, backend=compiler)
    for value, expected in zip(compiled(score, countable), select(score, countable, 0.5, capacity=15), strict=True):
        assert torch.equal(value, expected)
