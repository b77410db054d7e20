import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cggr_core import backends, sampling
from cggr_core.selection import Selection
from cggr_core.settings import SCOPES, SELECTIONS
from cggr_core.slots import slots_for
from cggr_core.strategies import select

WEIGHTED = ("stratified", "sampled", "random")


def batch(B, S, seed=0, share=0.8):
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(B, S, generator=generator) ** 3 * 5
    countable = torch.rand(B, S, generator=generator) < share
    return score, countable


def check_form(selection, countable):
    B, K = selection.index.shape
    length = countable.numel() // B if B else 0
    assert selection.index.dtype == torch.int64
    assert selection.valid.shape == selection.weight.shape == (B, K)
    assert selection.weight.dtype == torch.float32
    assert (selection.index.diff(dim=1) > 0).all()
    assert ((selection.index >= 0) & (selection.index < max(1, length))).all()
    assert (selection.weight[~selection.valid] == 0).all()
    assert (selection.weight[selection.valid] > 0).all()
    assert selection.weight.isfinite().all()
    assert not (selection.mask & ~countable).any()
    assert selection.mask.sum() == selection.valid.sum()
    kept, n = int(selection.valid.sum()), int(countable.sum())
    assert selection.ratio.dtype == torch.float32
    assert selection.ratio.item() == pytest.approx(kept / max(1, n))


def count(ratio, n):
    return min(n, max(1, round(ratio * n))) if n else 0


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(SELECTIONS),
    st.sampled_from(SCOPES),
    st.integers(1, 5),
    st.sampled_from([1, 2, 7, 31, 64, 257]),
    st.floats(0.01, 1.0),
    st.integers(0, 2**31),
    st.integers(1, 7),
)
def test_kept_counts_are_exact(selection, scope, B, S, ratio, seed, num_strata):
    score, countable = batch(B, S, seed)
    made = select(score, countable, ratio=ratio, selection=selection, scope=scope, num_strata=num_strata, seed=seed)
    check_form(made, countable)
    rows = countable if scope == "row" else countable.reshape(1, -1)
    expected = [count(ratio, int(n)) for n in rows.sum(1)]
    if selection == "sequence_aware" and scope == "batch":
        guaranteed = int(countable.any(1).sum())
        expected = [max(expected[0], guaranteed)]
    assert made.valid.sum(1).tolist() == expected
    assert made.index.shape[1] >= slots_for(ratio, rows.shape[1])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SELECTIONS),
    st.sampled_from(SCOPES),
    st.integers(1, 4),
    st.sampled_from([1, 7, 32, 65]),
    st.sampled_from([2, 3, 8]),
    st.floats(0.05, 1.0),
    st.integers(0, 2**31),
)
def test_blocks_are_kept_whole(selection, scope, B, S, block_size, ratio, seed):
    score, countable = batch(B, S, seed)
    made = select(score, countable, ratio=ratio, selection=selection, scope=scope, block_size=block_size, seed=seed)
    check_form(made, countable)
    padding = -S % block_size
    blocks_countable = torch.nn.functional.pad(countable, (0, padding)).view(B, -1, block_size)
    blocks_kept = torch.nn.functional.pad(made.mask, (0, padding)).view(B, -1, block_size)
    touched = blocks_kept.any(2)
    assert torch.equal(blocks_kept, touched[:, :, None] & blocks_countable)
    available = blocks_countable.any(2)
    available, touched = (t if scope == "row" else t.reshape(1, -1) for t in (available, touched))
    expected = [count(ratio, int(n)) for n in available.sum(1)]
    if selection == "sequence_aware" and scope == "batch":
        expected = [max(expected[0], int(countable.any(1).sum()))]
    assert touched.sum(1).tolist() == expected


@pytest.mark.parametrize(
    "score_kind", ["random", "constant", "zero", "one_large", "negative", "tiny", "huge", "infinite"]
)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("defensive_mix", [0.0, 0.05, 1.0])
def test_any_scores(score_kind, selection, defensive_mix):
    score, countable = batch(3, 67)
    if score_kind == "constant":
        score = torch.ones_like(score)
    elif score_kind == "zero":
        score = torch.zeros_like(score)
    elif score_kind == "one_large":
        score[0, 5], countable[0, 5] = 1e30, True
    elif score_kind == "negative":
        score = score - 2.5
    elif score_kind == "tiny":
        score = score * 1e-38
    elif score_kind == "huge":
        score = score * 6e37
    elif score_kind == "infinite":
        score[0, :3], score[1, :3] = float("inf"), -float("inf")
        countable[:2, :3] = True
    for draw in range(5):
        made = select(score, countable, ratio=0.3, selection=selection, draw=draw, defensive_mix=defensive_mix)
        check_form(made, countable)
        assert made.valid.sum(1).tolist() == [count(0.3, int(n)) for n in countable.sum(1)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_score_dtypes_and_strides(dtype):
    score, countable = batch(4, 50)
    score = score.to(dtype)
    expected = select(score.float(), countable, ratio=0.25)
    made = select(score, countable, ratio=0.25)
    assert torch.equal(made.index, expected.index)
    strided = select(score.T.contiguous().T, countable.T.contiguous().T, ratio=0.25)
    assert torch.equal(strided.index, expected.index)
    assert torch.equal(strided.weight, expected.weight)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("block_size", [1, 2])
def test_empty(shape, selection, scope, block_size):
    score, countable = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    made = select(score, countable, ratio=0.5, selection=selection, scope=scope, block_size=block_size)
    assert made.valid.sum() == 0
    assert made.mask.shape == shape
    assert made.ratio == 0.0


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("scope", SCOPES)
def test_nothing_countable(selection, scope):
    score, countable = batch(2, 9)
    made = select(score, torch.zeros_like(countable), ratio=0.5, selection=selection, scope=scope)
    check_form(made, torch.zeros_like(countable))
    assert not made.valid.any()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_ratio_of_one_keeps_everything_with_weight_one(selection, scope, block_size):
    score, countable = batch(3, 30)
    made = select(score, countable, ratio=1.0, selection=selection, scope=scope, block_size=block_size)
    assert torch.equal(made.mask, countable)
    torch.testing.assert_close(made.weight, made.valid.float())
    assert made.ratio == 1.0


def test_topk_by_hand():
    score = torch.tensor([[1.0, 5.0, 5.0, 9.0, 5.0, 2.0]])
    countable = torch.tensor([[True, True, True, False, True, True]])
    made = select(score, countable, ratio=0.4, selection="topk")
    assert made.index.tolist() == [[0, 1, 2]]  # slot 0 fills up
    assert made.valid.tolist() == [[False, True, True]]  # of the ties the lower positions, and not the uncountable one
    assert made.weight.tolist() == [[0.0, 2.5, 2.5]]


def test_sampled_probabilities_by_hand():
    # k = 2 of sizes 6, 1, 1, 1: the first is capped at 1, the others share the rest.
    pi = sampling._inclusion_probabilities(
        torch.tensor([[1.0, 6.0, 1.0, 1.0, 3.0]], dtype=torch.float64),
        torch.tensor([[True, True, True, True, False]]),
        torch.tensor([2]),
    )
    torch.testing.assert_close(pi, torch.tensor([[1 / 3, 1, 1 / 3, 1 / 3, 0]], dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60), st.data())
def test_inclusion_probabilities_solve_their_equation(sizes, data):
    k = data.draw(st.integers(1, len(sizes)))
    size = torch.tensor([sizes], dtype=torch.float64)
    pi = sampling._inclusion_probabilities(size, torch.ones_like(size, dtype=torch.bool), torch.tensor([k]))
    assert ((pi > 0) & (pi <= 1)).all()
    assert pi.sum().item() == pytest.approx(k)
    free = pi < 1 - 1e-9
    c = (pi / size)[free]
    if c.numel():
        torch.testing.assert_close(c, c[0].expand_as(c))
        assert (c[0] * size[~free] >= 1 - 1e-6).all()


def test_stratified_allocation_by_hand():
    # Two strata of four with root mean squares 3 and 1: k = 4 goes 3 : 1.
    score = torch.tensor([[3.0, 1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0]])
    countable = torch.ones(1, 8, dtype=torch.bool)
    for draw in range(20):
        made = select(score, countable, ratio=0.5, selection="stratified", num_strata=2, draw=draw, defensive_mix=0.0)
        assert (made.gather(score) == 3.0).sum() == 3
        torch.testing.assert_close(made.weight, torch.where(made.gather(score) == 3.0, 4 / 3, 4.0))


@pytest.mark.parametrize("scope", SCOPES)
def test_sequence_aware_guarantees_each_row(scope):
    score, countable = batch(4, 20, share=0.9)
    score[0] += 100.0
    countable[3] = False
    countable[2, 1:] = False
    countable[2, 0] = True
    made = select(score, countable, ratio=0.15, selection="sequence_aware", scope=scope, min_tokens_per_sequence=3)
    check_form(made, countable)
    kept = made.mask.sum(1).tolist()
    assert kept[1] >= 3 and kept[2] == 1 and kept[3] == 0
    top = score.masked_fill(~countable, -1).topk(kept[1], dim=1).indices[1]
    assert made.mask[1, top].all()
    one = select(score, countable, ratio=0.15, selection="sequence_aware", scope="batch", capacity=4)
    assert one.index.shape == (1, 4)


@pytest.mark.parametrize("scope", SCOPES)
def test_sequence_aware_without_a_guarantee_is_topk(scope):
    score, countable = batch(4, 20)
    made = select(score, countable, ratio=0.2, selection="sequence_aware", scope=scope, min_tokens_per_sequence=0)
    assert torch.equal(made.mask, select(score, countable, ratio=0.2, selection="topk", scope=scope).mask)


def test_capacity_limits_and_widens():
    score, countable = batch(2, 40, share=1.1)
    assert select(score, countable, ratio=0.5, capacity=7).valid.sum(1).tolist() == [7, 7]
    wide = select(score, countable, ratio=0.25, capacity=30)
    assert wide.index.shape == (2, 30)
    assert wide.valid.sum(1).tolist() == [10, 10]
    assert torch.equal(wide.mask, select(score, countable, ratio=0.25).mask)
    assert select(score, countable, ratio=0.5, capacity=900).index.shape == (2, 40)


@pytest.mark.parametrize("selection", WEIGHTED)
def test_a_limited_capacity_is_still_unbiased(selection):
    score, countable = batch(1, 20, share=1.1)
    many = score.expand(800, -1)  # every row draws for itself
    made = select(many, countable.expand_as(many), ratio=0.5, capacity=6, selection=selection)
    total = (made.weight * made.gather(many)).sum(1)
    assert abs(total.mean() - score.sum()) <= 4.5 * total.std() / 800**0.5 + 1e-4


@pytest.mark.parametrize("selection", WEIGHTED)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("block_size", [1, 3])
def test_weighted_sums_are_unbiased(selection, scope, block_size):
    score, countable = batch(3, 29, seed=5)
    values = torch.stack([score, torch.rand(3, 29), torch.randn(3, 29)], dim=2)  # what is summed need not be the score
    full = (values * countable[:, :, None]).sum((0, 1))
    # Rows draw for themselves, so batches one under the other are as many draws, but not where a draw is a batch's.
    copies = 200 if scope == "row" else 1
    score, countable, values = score.repeat(copies, 1), countable.repeat(copies, 1), values.repeat(copies, 1, 1)
    sums = []
    for draw in range(600 // copies if scope == "row" else 300):
        made = select(
            score, countable, ratio=0.3, selection=selection, scope=scope, block_size=block_size, seed=11, draw=draw
        )
        terms = made.weight[:, :, None] * made.gather(values)
        sums.append(terms.reshape(copies, -1, 3).sum(1))
    sums = torch.cat(sums)
    standard_error = sums.std(0) / len(sums) ** 0.5
    assert ((sums.mean(0) - full).abs() <= 4.5 * standard_error + 1e-3).all()


def test_probabilities_are_those_that_the_weights_say():
    score, countable = batch(1, 25, seed=2)
    rows, draws = 400, 1200
    for selection in WEIGHTED:
        hits, weights = torch.zeros(25), torch.zeros(25)
        for draw in range(draws // rows):
            made = select(score.expand(rows, -1), countable.expand(rows, -1), ratio=0.3, selection=selection, draw=draw)
            hits += made.mask.sum(0)
            weights[made.index[made.valid]] = made.weight[made.valid]
        seen = weights > 0
        pi = 1 / weights[seen]
        error = (pi * (1 - pi) / draws).clamp(min=0).sqrt()
        assert ((hits[seen] / draws - pi).abs() <= 5 * error + 1e-6).all(), selection
        assert pi.sum().item() == pytest.approx(count(0.3, int(countable.sum())), rel=1e-4)


def test_scored_sampling_varies_less_than_random():
    # Why it is worth having: the sum of something close to the score varies less.
    score, countable = (part.expand(100, -1) for part in batch(1, 200, seed=3))
    spread = {}
    for selection in WEIGHTED:
        made = select(score, countable, ratio=0.2, selection=selection)
        spread[selection] = (made.weight * made.gather(score)).sum(1).std()
    assert spread["sampled"] < spread["stratified"] < spread["random"]


def test_defensive_mix_bounds_the_weights():
    score, countable = torch.zeros(1, 1000), torch.ones(1, 1000, dtype=torch.bool)
    score[0, :10] = 1.0
    for selection in ("sampled", "stratified"):
        largest = max(
            select(score, countable, ratio=0.1, selection=selection, draw=draw, defensive_mix=0.1).weight.max().item()
            for draw in range(20)
        )
        assert largest <= 1 / (0.1 * 0.1) * 1.2


@pytest.mark.parametrize("selection", SELECTIONS)
def test_without_inverse_probabilities_the_weights_make_a_plain_mean_of_each_row(selection):
    score, countable = batch(3, 40)
    made = select(score, countable, ratio=0.3, selection=selection, unbiased=False)
    sums = (made.weight * made.gather(score)).sum(1)
    for row in range(3):
        expected = score[row, made.mask[row]].mean() * countable[row].sum()
        torch.testing.assert_close(sums[row], expected)
    whole = select(score, countable, ratio=0.3, selection=selection, unbiased=False, scope="batch")
    loss = (whole.weight * whole.gather(score)).sum() / countable.sum()
    torch.testing.assert_close(loss, score[whole.mask].mean())


@pytest.mark.parametrize("selection", ["topk", "sequence_aware"])
def test_permuting_rows_permutes_the_selection(selection):
    score, countable = batch(5, 33)
    order = torch.tensor([3, 0, 4, 1, 2])
    a, b = (
        select(score, countable, ratio=0.3, selection=selection),
        select(score[order], countable[order], ratio=0.3, selection=selection),
    )
    assert torch.equal(a.mask[order], b.mask)


@pytest.mark.parametrize("selection", WEIGHTED)
def test_permuting_rows_permutes_the_counts_and_probabilities(selection):
    score, countable = batch(5, 33)
    order = torch.tensor([3, 0, 4, 1, 2])
    a = select(score, countable, ratio=0.3, selection=selection)
    b = select(score[order], countable[order], ratio=0.3, selection=selection)
    assert torch.equal(a.valid.sum(1)[order], b.valid.sum(1))
    both = a.mask[order] & b.mask
    dense = [torch.zeros(5, 33).scatter(1, made.index, made.weight) for made in (a, b)]
    torch.testing.assert_close(dense[0][order][both], dense[1][both])


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_row_keeps_the_same_whatever_is_around_it(selection, unbiased):
    score, countable = batch(4, 30)
    settings = {"ratio": 0.3, "selection": selection, "unbiased": unbiased, "seed": 3, "draw": 5}
    whole = select(score, countable, **settings, first_row=2)

    def dense(made):
        return torch.zeros(made.shape).scatter(1, made.index, made.weight)

    for rows in (slice(0, 1), slice(1, 3), slice(3, 4)):
        # Padded on the right, as in a micro-batch that holds a longer row.
        parts = [torch.nn.functional.pad(tensor[rows], (0, 7)) for tensor in (score, countable)]
        part = select(*parts, **settings, first_row=2 + rows.start)
        assert torch.equal(part.mask[:, :30], whole.mask[rows])
        on_device = select(*parts, **settings, first_row=torch.tensor(2 + rows.start))
        assert torch.equal(on_device.index, part.index) and torch.equal(on_device.weight, part.weight)
        torch.testing.assert_close(dense(part)[:, :30], dense(whole)[rows])
    if selection in WEIGHTED:
        assert not torch.equal(whole.mask, select(score, countable, **settings).mask)


@pytest.mark.parametrize("selection", WEIGHTED)
def test_seed_and_draw(selection):
    score, countable = batch(2, 60)

    def mask(**at):
        return select(score, countable, ratio=0.25, selection=selection, **at).mask

    assert torch.equal(mask(seed=1, draw=2), mask(seed=1, draw=2))
    assert torch.equal(mask(seed=1, draw=2), mask(seed=1, draw=torch.tensor(2)))
    assert not torch.equal(mask(seed=1, draw=2), mask(seed=1, draw=3))
    assert not torch.equal(mask(seed=1, draw=2), mask(seed=2, draw=2))


def test_gather_and_mask():
    score, countable = batch(2, 10, share=1.1)
    vectors = torch.randn(2, 10, 3)
    for scope in SCOPES:
        made = select(score, countable, ratio=0.4, scope=scope)
        assert torch.equal(made.gather(vectors)[made.valid], vectors[made.mask])
        assert torch.equal(made.gather(score)[made.valid], score[made.mask])
    with pytest.raises(ValueError, match=r"tensor must have shape \(2, 10\)"):
        made.gather(torch.zeros(2, 9))


def test_from_mask():
    mask = torch.zeros(2, 200, dtype=torch.bool)
    mask[0, ::3], mask[1, 5] = True, True
    made = Selection.from_mask(mask)
    check_form(made, torch.ones_like(mask))
    assert made.index.shape == (2, 72)  # 67 rounded up to a multiple of 8
    assert torch.equal(made.mask, mask)
    weight = torch.rand(2, 200) + 0.5
    made = Selection.from_mask(mask, weight=weight, countable=mask, capacity=67)
    torch.testing.assert_close(made.weight[made.valid], weight[mask])
    assert made.ratio == 1.0
    assert Selection.from_mask(mask, countable=mask).weight.max() == 1.0
    assert Selection.from_mask(mask, capacity=10).valid.sum(1).tolist() == [10, 1]
    nothing = Selection.from_mask(torch.zeros(2, 5, dtype=torch.bool))
    assert nothing.index.shape == (
        2,
        1,
    )  # an empty slot each, so that a pass over the kept tokens has a token to run on
    assert not nothing.valid.any()
    assert not nothing.weight.any()
    assert Selection.from_mask(torch.zeros(0, 5, dtype=torch.bool)).mask.shape == (0, 5)
    assert Selection.from_mask(torch.ones(2, 5, dtype=torch.bool)).index.shape == (2, 5)


def test_runs_without_a_device():
    # Meta tensors have no values: any host read would raise.
    score, countable = torch.zeros(3, 50, device="meta"), torch.zeros(3, 50, dtype=torch.bool, device="meta")
    for selection in SELECTIONS:
        for scope in SCOPES:
            for block_size in (1, 4):
                made = select(score, countable, ratio=0.25, selection=selection, scope=scope, block_size=block_size)
                assert made.mask.shape == (3, 50)


@pytest.mark.parametrize(
    ("selection", "scope", "block_size"),
    [*((selection, "row", 1) for selection in SELECTIONS), ("stratified", "batch", 4), ("sequence_aware", "batch", 4)],
)
def test_compiles_as_one_graph(selection, scope, block_size):
    score, countable = batch(2, 30)

    def choose(score, countable, draw):
        made = select(score, countable, ratio=0.3, selection=selection, scope=scope, block_size=block_size, draw=draw)
        return made.index, made.valid, made.weight, made.mask

    torch.compiler.reset()
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(score, countable, torch.tensor(3)), choose(score, countable, 3), strict=True):
        assert torch.equal(a, b)


def test_a_kernel_is_used_where_there_is_one(monkeypatch):
    calls = []

    def kernel(*arguments):
        calls.append((tuple(arguments[0].shape), *arguments[2:]))
        return sampling.select_reference(*arguments)

    monkeypatch.setitem(backends._registry.kernels, ("select", "cpu"), ("test", kernel))
    score, countable = batch(3, 40)
    select(score, countable, ratio=0.25, scope="batch", seed=4, draw=2)
    select(score, countable, ratio=0.25, selection="topk", block_size=4)
    assert calls == [
        ((1, 120), 0.25, "stratified", 30, 4, 1, True, 4, 2, 0.05, 0),
        ((3, 10), 0.25, "topk", 3, 4, 1, True, 0, 0, 0.05, 0),
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ratio": 0.0}, ValueError, r"ratio must be in \(0, 1\], got 0.0"),
        ({"selection": "top_k"}, ValueError, "selection must be one of .*did you mean 'topk'"),
        ({"scope": "rows"}, ValueError, "scope must be one of .*did you mean 'row'"),
        ({"num_strata": 0}, ValueError, "num_strata must be at least 1, got 0"),
        ({"block_size": 1.5}, TypeError, "block_size must be an integer, got 1.5"),
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"defensive_mix": 1.5}, ValueError, r"defensive_mix must be in \[0, 1\], got 1.5"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"draw": "3"}, TypeError, "draw must be an integer, got '3'"),
        ({"draw": torch.zeros(2).long()}, TypeError, r"0-dim int64 tensor, got torch.int64 of shape \[2\]"),
        ({"first_row": torch.tensor(1.0)}, TypeError, "first_row must be an integer or a 0-dim int64 tensor, got"),
    ],
)
def test_bad_arguments(change, error, message):
    score, countable = batch(2, 5)
    with pytest.raises(error, match=message):
        select(score, countable, **{"ratio": 0.5, **change})


def test_bad_tensors():
    score, countable = batch(2, 5, share=1.1)
    with pytest.raises(ValueError, match=r"score must be \[B, S\], got shape \(5,\)"):
        select(score[0], countable[0], ratio=0.5)
    with pytest.raises(TypeError, match=r"countable must be a bool tensor, got torch.int64; use countable.bool\(\)"):
        select(score, countable.long(), ratio=0.5)
    with pytest.raises(ValueError, match=r"countable must have shape \(2, 5\) \(that of score\), got \(2, 4\)"):
        select(score, countable[:, :4], ratio=0.5)
    score[0, 0] = score[1, 1] = float("nan")
    with pytest.raises(ValueError, match="score is NaN at 2 of 10 countable tokens"):
        select(score, countable, ratio=0.5)
    countable[0, 0] = countable[1, 1] = False
    select(score, countable, ratio=0.5)
    with pytest.raises(ValueError, match=r"mask must be \[B, S\], got shape \(5,\)"):
        Selection.from_mask(countable[0])
    with pytest.raises(ValueError, match=r"weight must have shape \(2, 5\)"):
        Selection.from_mask(countable, weight=torch.zeros(2, 4))
