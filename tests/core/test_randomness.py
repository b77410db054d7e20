import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cggr_core.randomness import uniform

MASK = (1 << 64) - 1


def splitmix64_output(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uniform_in_python(n, seed, draw):
    golden = 0x9E3779B97F4A7C15
    key = splitmix64_output((draw * golden + seed * 0xD1342543DE82EF95) & MASK)
    key = splitmix64_output((key + golden) & MASK)
    return [((splitmix64_output((i * golden + key) & MASK) >> 12) + 0.5) * 2.0**-52 for i in range(n)]


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**62))
def test_equals_the_formula_in_unbounded_integers(seed, draw):
    assert uniform((7,), seed=seed, draw=draw).tolist() == uniform_in_python(7, seed, draw)


def test_mixing_function_is_the_published_one():
    # First output of SplitMix64 from state 0 is the mix of one increment.
    assert splitmix64_output(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF


def test_moments_and_range():
    u = uniform((200_000,), seed=3)
    assert u.min() > 0.0 and u.max() < 1.0
    assert abs(u.mean() - 0.5) < 5 / (12 * 200_000) ** 0.5
    assert abs(u.var() * 12 - 1) < 0.02
    lag = torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]
    assert abs(lag) < 5 / 200_000**0.5
    counts = torch.histc(u, 64, 0, 1)
    assert ((counts - 200_000 / 64).abs() < 5 * (200_000 / 64) ** 0.5).all()


@pytest.mark.parametrize("other", [{"seed": 1, "draw": 0}, {"seed": 0, "draw": 1}, {"seed": -1, "draw": 0}])
def test_seeds_and_draws_are_uncorrelated(other):
    a, b = uniform((50_000,), seed=0), uniform((50_000,), **other)
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 5 / 50_000**0.5
    assert not torch.equal(uniform((8,), seed=1, draw=0), uniform((8,), seed=0, draw=1))


def test_draw_as_a_tensor_and_parts_of_a_draw():
    whole = uniform((3, 5), seed=9, draw=4)
    assert torch.equal(whole, uniform((3, 5), seed=9, draw=torch.tensor(4)))
    assert torch.equal(whole.flatten()[5:], uniform((10,), seed=9, draw=4, offset=5))
    assert uniform((0, 5), seed=1).shape == (0, 5)
    rows = uniform((3, 5), seed=9, draw=4, offset=2, stride=4)
    assert torch.equal(rows[1], uniform((5,), seed=9, draw=4, offset=6))


def test_compiles_with_a_draw_on_the_device():
    compiled = torch.compile(lambda draw: uniform((4,), seed=2, draw=draw), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(torch.tensor(6)), uniform((4,), seed=2, draw=6))
