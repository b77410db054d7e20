import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cggr_core import difficulty
from cggr_core.difficulty import FIELDS
from cggr_core.scoring import fields_for, score
from cggr_core.settings import SCORINGS
from cggr_core.statistics import TokenStatistics, linear_token_statistics, token_statistics
from tests.support.allocations import largest_allocation

INF = float("inf")


def truth(logits, targets=None, ignore_index=-100):
    """The definitions, in float64 and without regard to speed."""
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    top = torch.cat([p, torch.zeros_like(p[..., :1])], -1).topk(2, -1).values
    out = {
        "entropy": -(p * log_p.masked_fill(log_p == -INF, 0)).sum(-1),
        "confidence": top[..., 0],
        "margin": top[..., 0] - top[..., 1],
    }
    if targets is not None:
        safe = targets.masked_fill(targets == ignore_index, 0)
        out["nll"] = -log_p.gather(-1, safe[..., None])[..., 0]
        onehot = torch.nn.functional.one_hot(safe, logits.shape[-1])
        out["gradnorm"] = (p - onehot).norm(dim=-1)
        out = {name: value.masked_fill(targets == ignore_index, 0) for name, value in out.items()}
    return out


def assert_near_truth(statistics, expected, atol=2e-6, rtol=2e-6):
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(statistics, name).double(), value, atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


def targets_for(shape, V):
    targets = torch.randint(0, V, shape)
    return targets.masked_fill(torch.rand(shape) < 0.2, -100)


def test_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.25]).log()[None]
    found = token_statistics(logits, torch.tensor([1]))
    assert found.entropy.item() == pytest.approx(1.5 * math.log(2))
    assert found.confidence.item() == pytest.approx(0.5)
    assert found.margin.item() == pytest.approx(0.25)
    assert found.nll.item() == pytest.approx(math.log(4))
    assert found.gradnorm.item() == pytest.approx((0.25 + 0.5625 + 0.0625) ** 0.5)
    assert found.vocab_size == 3


def test_scores_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.25]).log()[None]
    found = token_statistics(logits, torch.tensor([1]))
    ln3 = math.log(3)
    expected = {
        "entropy": 1.5 * math.log(2),
        "margin": 0.75,
        "loss": math.log(4),
        "combined": 1.5 * math.log(2) / ln3 + 0.75 + math.log(4) / ln3,
        "gradnorm": 0.875**0.5,
        "excess": math.log(4) - 0.5,
    }
    assert set(expected) == set(SCORINGS)
    for scoring, value in expected.items():
        reference_nll = torch.tensor([0.5]) if scoring == "excess" else None
        got = score(found, scoring=scoring, reference_nll=reference_nll)
        assert got.dtype == torch.float32
        assert got.item() == pytest.approx(value), scoring
    untargeted = token_statistics(logits)
    assert score(untargeted, scoring="combined").item() == pytest.approx(1.5 * math.log(2) / ln3 + 0.75)


@pytest.mark.parametrize("scoring", SCORINGS)
@given(st.floats(0.0, 4.0), st.floats(0.05, 4.0), st.integers(2, 30))
@settings(max_examples=30, deadline=None)
def test_higher_is_always_harder(scoring, low, more, V):
    # The target's logit leads the others by less: the model is less sure, and less right.
    logits = torch.zeros(2, V)
    logits[0, 0], logits[1, 0] = low + more, low
    found = token_statistics(logits, torch.zeros(2, dtype=torch.long))
    reference_nll = torch.ones(2) if scoring == "excess" else None
    easy, hard = score(found, scoring=scoring, reference_nll=reference_nll).tolist()
    assert hard > easy


@pytest.mark.parametrize("scoring", ["loss", "combined", "gradnorm", "excess"])
def test_a_wrong_answer_is_harder_than_a_right_one(scoring):
    logits = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0]])
    found = token_statistics(logits, torch.tensor([0, 2]))
    reference_nll = torch.zeros(2) if scoring == "excess" else None
    right, wrong = score(found, scoring=scoring, reference_nll=reference_nll).tolist()
    assert wrong > right


@pytest.mark.parametrize(
    "shape", [(0, 5), (1, 1), (7, 2), (7, 257), (3, 511), (3, 513), (2, 3, 1031), (2, 2048), (33, 8192)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_the_definitions(shape, dtype):
    logits = (torch.randn(shape) * 4).to(dtype)
    targets = targets_for(shape[:-1], shape[-1])
    found = token_statistics(logits, targets)
    assert found.nll.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.nll.shape == shape[:-1]
    assert_near_truth(found, truth(logits, targets))
    assert_near_truth(token_statistics(logits), truth(logits))


@pytest.mark.parametrize("V", [3, 257, 1031])
def test_extremes(V):
    logits = torch.zeros(6, V)
    logits[0, 1:] = -INF  # certain
    logits[1] = torch.linspace(-1e4, 1e4, V)
    logits[2, : V // 2] = -INF
    logits[3] = 1e4
    logits[4, 0], logits[4, 1] = 1e4, -1e4
    logits[5, -1] = 30.0
    targets = torch.tensor([0, 0, V - 1, 1, 1, V - 1])
    assert_near_truth(token_statistics(logits, targets), truth(logits, targets), atol=1e-4, rtol=1e-6)


def test_a_target_of_probability_zero_has_an_infinite_nll_and_no_nan():
    logits = torch.tensor([[0.0, -INF, 1.0]])
    found = token_statistics(logits, torch.tensor([1]))
    assert found.nll.item() == INF
    assert not any(column.isnan().any() for column in found[:-1])


def test_gradnorm_keeps_its_digits_where_the_model_is_nearly_right():
    logits = torch.tensor([[0.0, 20.0]])
    p_wrong = math.exp(-20) / (1 + math.exp(-20))
    found = token_statistics(logits, torch.tensor([1]))
    assert found.gradnorm.item() == pytest.approx(2**0.5 * p_wrong, rel=1e-5)


@pytest.mark.parametrize("V", [2, 600])
def test_margin_of_ties_is_zero(V):
    logits = torch.randn(5, V)
    logits[:, -1] = logits[:, 0] = 9.0
    assert token_statistics(logits, fields={"margin"}).margin.abs().max() == 0.0


@pytest.mark.parametrize("place", range(0, 1100, 61))
def test_margin_finds_the_two_largest_wherever_they_are(place):
    logits = torch.zeros(1, 1100)
    logits[0, place], logits[0, (place * 7 + 13) % 1100] = 5.0, 4.0
    assert_near_truth(token_statistics(logits, fields={"margin"}), {"margin": truth(logits)["margin"]})


def test_ignored_rows_hold_zeros():
    found = token_statistics(torch.randn(3, 7), torch.full((3,), -100))
    assert all((column == 0).all() for column in found[:-1])
    found = token_statistics(torch.randn(3, 7), torch.tensor([5, 1, 2]), ignore_index=5)
    assert found.nll[0] == 0.0 and found.nll[1] > 0.0


@pytest.mark.parametrize("fields", [{name} for name in FIELDS] + [{"entropy", "gradnorm"}, {"margin", "nll"}, set()])
def test_only_what_is_asked_for(fields):
    logits, targets = torch.randn(4, 300), targets_for((4,), 300)
    everything, some = token_statistics(logits, targets), token_statistics(logits, targets, fields=fields)
    hidden, weight = torch.randn(4, 6), torch.randn(300, 6)
    linear = linear_token_statistics(hidden, weight, targets, fields=fields)
    for name in FIELDS:
        if name in fields:
            torch.testing.assert_close(getattr(some, name), getattr(everything, name))
        else:
            assert getattr(some, name) is None
        assert (getattr(linear, name) is None) == (name not in fields)


def test_fields_for():
    assert fields_for("combined") == {"entropy", "margin", "nll"}
    assert fields_for("combined", has_targets=False) == {"entropy", "margin"}
    assert fields_for("gradnorm") == {"gradnorm"}
    for scoring in ("loss", "gradnorm", "excess"):
        with pytest.raises(ValueError, match=f"scoring='{scoring}' needs targets, but none were given"):
            fields_for(scoring, has_targets=False)


@pytest.mark.parametrize("view", ["sliced", "transposed", "strided", "expanded"])
def test_any_strides(view):
    base = torch.randn(4, 6, 70)
    logits = {
        "sliced": base[:, 1:],
        "transposed": base.transpose(0, 1),
        "strided": base[..., ::2],
        "expanded": base[:, :1].expand(-1, 3, -1),
    }[view]
    targets = targets_for(logits.shape[:-1], logits.shape[-1])
    assert_near_truth(token_statistics(logits, targets), truth(logits, targets))


def test_leading_shapes():
    assert token_statistics(torch.randn(9), torch.tensor(2)).nll.shape == ()
    assert token_statistics(torch.randn(2, 3, 4, 9)).entropy.shape == (2, 3, 4)
    assert token_statistics(torch.randn(2, 0, 9), torch.zeros(2, 0, dtype=torch.long)).nll.shape == (2, 0)
    assert token_statistics(torch.randn(3, 4, 9)[:, 4:]).entropy.shape == (3, 0)


def test_does_not_change_or_track_its_input():
    logits = torch.randn(5, 40, requires_grad=True)
    before = logits.detach().clone()
    found = token_statistics(logits, torch.arange(5))
    assert not any(column.requires_grad for column in found[:-1])
    assert torch.equal(logits.detach(), before)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 700), st.integers(0, 2**31))
def test_rows_do_not_see_each_other(N, V, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=generator) * 3
    targets = torch.randint(0, V, (N,), generator=generator)
    order = torch.randperm(N, generator=generator)
    whole, permuted = token_statistics(logits, targets), token_statistics(logits[order], targets[order])
    for a, b in zip(whole[:-1], permuted[:-1], strict=True):
        torch.testing.assert_close(a[order], b, atol=1e-6, rtol=1e-6)


HEADS = [
    {},
    {"bias": True},
    {"softcap": 3.0},
    {"scale": 0.25},
    {"bias": True, "softcap": 3.0, "scale": 0.25},
]


def head_of(kind, V):
    return {name: torch.randn(V) if name == "bias" else value for name, value in kind.items()}


def logits_of(hidden, weight, bias=None, softcap=None, scale=None):
    logits = hidden @ weight.T
    logits = logits if bias is None else logits + bias
    logits = logits if scale is None else logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 5), (0,), (257,)])
def test_linear_equals_the_statistics_of_its_logits(kind, shape, monkeypatch):
    monkeypatch.setattr(difficulty, "_CPU_HEAD_CHUNK", 1300)  # many chunks
    H, V = 16, 257
    hidden, weight, head = torch.randn(*shape, H), torch.randn(V, H), head_of(kind, V)
    targets = targets_for(shape, V)
    found = linear_token_statistics(hidden, weight, targets, **head)
    expected = token_statistics(logits_of(hidden, weight, **head), targets)
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(a, b, atol=3e-5, rtol=3e-5)
    assert linear_token_statistics(hidden, weight, **head).nll is None


def test_linear_under_autocast_runs_in_its_dtype():
    hidden, weight = torch.randn(5, 16), torch.randn(50, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_token_statistics(hidden, weight)
    expected = token_statistics(hidden.bfloat16() @ weight.bfloat16().T)
    torch.testing.assert_close(found.entropy, expected.entropy)
    assert found.entropy.dtype == torch.float32


@pytest.mark.parametrize("N", [64, 4096])
def test_extra_memory_does_not_grow_with_the_tokens(N, monkeypatch):
    monkeypatch.setattr(difficulty, "_CPU_CHUNK", 2048)
    monkeypatch.setattr(difficulty, "_CPU_HEAD_CHUNK", 2048)
    V, H = 64, 8
    logits, targets = torch.randn(N, V), targets_for((N,), V)
    hidden, weight = torch.randn(N, H), torch.randn(V, H)
    sliced = torch.randn(8, N // 8 + 1, V)[:, 1:]
    limit = max(2048, N)  # a chunk, or one number per token
    assert largest_allocation(lambda: token_statistics(logits, targets)) <= limit
    assert largest_allocation(lambda: token_statistics(sliced, targets.view(8, -1))) <= limit
    assert largest_allocation(lambda: linear_token_statistics(hidden, weight, targets)) <= limit


def test_compiles_as_one_graph():
    logits, targets = torch.randn(2, 6, 600), targets_for((2, 6), 600)
    hidden, weight = torch.randn(2, 6, 8), torch.randn(600, 8)

    def scores(logits, targets, hidden, weight):
        plain = token_statistics(logits[:, 1:], targets[:, 1:])
        linear = linear_token_statistics(hidden, weight, targets, softcap=2.0)
        return score(plain, scoring="combined"), score(linear, scoring="gradnorm")

    compiled = torch.compile(scores, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(logits, targets, hidden, weight), scores(logits, targets, hidden, weight), strict=True):
        torch.testing.assert_close(a, b)


def test_a_kernel_is_used_where_there_is_one(monkeypatch):
    from cggr_core import backends

    calls = []

    def kernel(logits, targets, ignore_index):
        calls.append(logits.shape)
        return difficulty.difficulty_reference(logits, targets, ignore_index)

    def linear_kernel(*arguments):
        calls.append(arguments[0].shape)
        return difficulty.linear_difficulty_reference(*arguments)

    monkeypatch.setitem(backends._registry.kernels, ("difficulty", "cpu"), ("test", kernel))
    monkeypatch.setitem(backends._registry.kernels, ("linear_difficulty", "cpu"), ("test", linear_kernel))
    logits, targets = torch.randn(3, 4, 9), targets_for((3, 4), 9)
    found = token_statistics(logits[:, 1:], targets[:, 1:], fields={"nll"})
    assert calls == [(3, 9)] * 3
    assert found.entropy is None
    assert_near_truth(found, {"nll": truth(logits[:, 1:], targets[:, 1:])["nll"]})
    found = linear_token_statistics(torch.randn(3, 4, 5), torch.randn(9, 5))
    assert calls[-1] == (12, 5)
    assert found.nll is None and found.entropy.shape == (3, 4)


def test_references_return_five_columns():
    hidden, weight = torch.randn(3, 5), torch.randn(9, 5)
    for targets in (None, torch.tensor([1, -100, 2])):
        plain = difficulty.difficulty_reference(hidden @ weight.T, targets, -100)
        linear = difficulty.linear_difficulty_reference(hidden, weight, targets, None, None, None, -100)
        for a, b in zip(plain, linear, strict=True):
            assert a.shape == (3,)
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert (plain[3] == 0).all() == (targets is None)


def test_bad_logits_and_targets():
    with pytest.raises(TypeError, match=r"logits must have a floating dtype, got torch.int64"):
        token_statistics(torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"logits must be \[\.\.\., V\] with V of at least 1, got shape \(2, 0\)"):
        token_statistics(torch.zeros(2, 0))
    with pytest.raises(
        ValueError, match=r"targets must have shape \(2,\) \(one target per row of logits\), got \(3,\)"
    ):
        token_statistics(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"targets holds 1 value\(s\) outside the vocabulary \(the first is 3\)"):
        token_statistics(torch.zeros(2, 3), torch.tensor([0, 3]))
    logits = torch.zeros(4, 3)
    logits[1, 1] = float("nan")
    logits[2, 0] = INF
    logits[3] = -INF
    with pytest.raises(ValueError, match="logits are NaN, or have no finite maximum, at 3 of 4 positions"):
        token_statistics(logits)
    with pytest.raises(ValueError, match="did you mean 'entropy'"):
        token_statistics(torch.zeros(2, 3), fields={"entrpy"})
    with pytest.raises(ValueError, match="field 'nll' needs targets, but none were given"):
        token_statistics(torch.zeros(2, 3), fields={"nll"})


def test_bad_heads():
    hidden, weight = torch.randn(4, 8), torch.randn(16, 8)
    with pytest.raises(
        ValueError, match=r"weight must be \[V, H\] with the H of hidden \[\.\.\., H\], got weight \(8, 16\)"
    ):
        linear_token_statistics(hidden, weight.T)
    with pytest.raises(ValueError, match=r"bias must have shape \(16,\) \(one per row of weight\), got \(8,\)"):
        linear_token_statistics(hidden, weight, bias=torch.zeros(8))
    with pytest.raises(ValueError, match="softcap must be a finite number above 0, or None, got 0"):
        linear_token_statistics(hidden, weight, softcap=0)
    with pytest.raises(
        TypeError, match=r"hidden is torch.float32 but weight is torch.bfloat16; cast one of them, or call"
    ):
        linear_token_statistics(hidden, weight.bfloat16())
    with pytest.raises(ValueError, match="weight is on meta but hidden is on cpu"):
        linear_token_statistics(hidden, weight.to("meta"))


def test_bad_scores():
    found = token_statistics(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"scoring must be one of .*did you mean 'gradnorm'"):
        score(found, scoring="gradnrm")
    with pytest.raises(ValueError, match="scoring='excess' needs reference_nll"):
        score(found, scoring="excess")
    with pytest.raises(ValueError, match=r"reference_nll must have shape \(2,\) \(one per token\), got \(3,\)"):
        score(found, scoring="excess", reference_nll=torch.zeros(3))
    with pytest.raises(ValueError, match="reference_nll is used only by scoring='excess', got scoring='loss'"):
        score(found, scoring="loss", reference_nll=torch.zeros(2))
    empty = TokenStatistics(None, None, None, None, None, 3)
    with pytest.raises(ValueError, match="scoring='margin' needs the statistic 'margin', which was not computed"):
        score(empty, scoring="margin")
