"""Edge cases of the losses: what they check, ignore and report."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from cggr_core import linear_loss, schedule
from cggr_core.coefficients import loss_coefficients
from cggr_core.linear_loss import linear_cross_entropy
from cggr_core.loss import CGGRLinearLoss, CGGRLoss
from cggr_core.selection import Selection
from cggr_core.token_loss import check_per_token

B, S, V, H = 2, 9, 11, 6


def logits_and_targets(ignore_index=-100):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B, S, V, generator=generator) * 2
    targets = torch.randint(1, V, (B, S), generator=generator)
    targets[0, :3] = ignore_index
    return logits, targets


def operands():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, S, H, generator=generator), torch.randn(V, H, generator=generator), logits_and_targets()[1]


@pytest.mark.parametrize("ignore_index", [0, -1, -100, 999])
@pytest.mark.parametrize("linear_head", [False, True])
def test_any_ignored_label(ignore_index, linear_head):
    logits, targets = logits_and_targets(ignore_index)
    hidden, weight, _ = operands()
    settings = {"ignore_index": ignore_index, "min_tokens_ratio": 0.9, "dynamic_threshold": True}
    settings |= {"selection": "topk", "scoring": "loss"}
    if linear_head:
        logits = linear(hidden, weight)
        criterion = CGGRLinearLoss(**settings)
        criterion(hidden, weight, targets)
    else:
        criterion = CGGRLoss(**settings)
        criterion(logits, targets)
    countable = targets != ignore_index
    nll = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=ignore_index, reduction="none")
    found = criterion.metrics
    assert found["countable_tokens"] == 15 and found["kept_tokens"] == 14
    torch.testing.assert_close(found["full_loss"], nll.sum() / 15)
    torch.testing.assert_close(found["loss"], (nll.sum() - nll.reshape(B, S)[countable].min()) / 14)
    # The schedule's confidence is that of the tokens that count.
    confidence = logits.softmax(-1).amax(-1)[countable].mean()
    torch.testing.assert_close(found["confidence"], confidence)
    assert criterion.get_extra_state()[2].item() == pytest.approx(confidence.item(), rel=1e-5)
    outside = targets.masked_fill(countable, V + 1)
    with pytest.raises(ValueError, match=r"^targets holds 15 value\(s\) outside the vocabulary"):
        criterion(hidden, weight, outside) if linear_head else criterion(logits, outside)


def test_scores_of_what_is_dropped_are_those_of_countable_tokens():
    logits, targets = logits_and_targets()
    criterion = CGGRLoss(scoring="loss", selection="topk", min_tokens_ratio=0.4)
    criterion(logits, targets)
    nll = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").reshape(B, S)
    ranked = nll[targets != -100].sort(descending=True).values
    torch.testing.assert_close(criterion.metrics["score_kept"], ranked[:6].mean())
    torch.testing.assert_close(criterion.metrics["score_dropped"], ranked[6:].mean())


@pytest.mark.parametrize("shape", [(3, 1), (1, 4), (5, 2)])
def test_logits_whose_rows_are_not_one_after_another(shape):
    wide = torch.randn(shape[0], shape[1] + 3, V)
    logits, targets = wide[:, : shape[1]], torch.randint(0, V, shape)
    found = CGGRLoss(min_tokens_ratio=1.0)(logits, targets)
    torch.testing.assert_close(found, cross_entropy(logits.reshape(-1, V), targets.flatten()))


def test_a_single_token_and_a_single_class():
    logits, targets = torch.randn(1, 1, V), torch.tensor([[3]])
    wanted = cross_entropy(logits[0], targets[0])
    torch.testing.assert_close(CGGRLoss()(logits, targets), wanted)
    torch.testing.assert_close(CGGRLoss()(logits[0], targets[0]), wanted)
    assert CGGRLoss()(torch.randn(2, 3, 1), torch.zeros(2, 3, dtype=torch.int64)) == 0.0


def test_forwards_without_a_step_are_noticed(monkeypatch):
    monkeypatch.setattr(schedule, "_FORWARDS_BEFORE_WARNING", 2)
    criterion = CGGRLoss(warmup_steps=5)
    criterion(*logits_and_targets())
    with pytest.warns(UserWarning, match=r"warmup_steps=5, but step\(\) was not called in 2 training forwards"):
        criterion(*logits_and_targets())


def test_nothing_is_scored_where_everything_is_kept():
    criterion = CGGRLoss(min_tokens_ratio=1.0)
    criterion(*logits_and_targets())
    assert set(criterion.metrics) == {"loss", "keep_ratio", "kept_tokens", "countable_tokens"}


def test_means_over_one_token():
    logits, targets = torch.randn(1, 2, V), torch.tensor([[3, 4]])
    criterion = CGGRLoss(scoring="loss", selection="topk", min_tokens_ratio=0.5)
    criterion(logits, targets)
    nll = cross_entropy(logits[0], targets[0], reduction="none")
    torch.testing.assert_close(criterion.metrics["score_kept"], nll.max())
    torch.testing.assert_close(criterion.metrics["score_dropped"], nll.min())


def test_flat_input_has_its_weights_and_references():
    logits, targets = logits_and_targets()
    weight, reference = torch.rand(B, S), torch.rand(B, S) * 3
    criterion = CGGRLoss(scoring="excess", selection="topk", min_tokens_ratio=0.4)
    wanted = criterion(logits, targets, token_weight=weight, reference_nll=reference)
    flat = (logits.flatten(0, 1), targets.flatten())
    found = criterion(*flat, token_weight=weight.flatten(), reference_nll=reference.flatten())
    torch.testing.assert_close(found, wanted)
    evaluated = criterion.eval()(*flat, token_weight=weight.flatten(), num_items=7)
    nll = cross_entropy(*flat, reduction="none")
    torch.testing.assert_close(evaluated, (nll * weight.flatten()).sum() / 7)


@pytest.mark.parametrize("make", [CGGRLoss, CGGRLinearLoss])
def test_what_an_earlier_step_reported_is_raised_by_both(make):
    criterion = make()
    arguments = logits_and_targets() if make is CGGRLoss else operands()
    criterion(*arguments)
    criterion._monitor.post(torch.tensor([2.0, 0.0, 0.5]))
    with pytest.raises(
        ValueError, match=r"^in an earlier step, targets holds 2 value\(s\) outside the vocabulary: acc"
    ):
        criterion(*arguments)
    criterion(*arguments)
    criterion._monitor.post(torch.tensor([0.0, 2.0, 0.5]))
    with pytest.raises(ValueError, match=r"^in an earlier step, logits were NaN at 2 countable"):
        criterion(*arguments)


@pytest.mark.parametrize(("scoring", "broken", "reported"), [("loss", True, 3), (None, True, 1), ("loss", False, 0)])
def test_what_is_reported_where_values_are_not_read(scoring, broken, reported, monkeypatch):
    # As on a GPU: nothing is looked at in the step, and counted for the next one.
    for name in ("token_loss", "coefficients", "checks", "statistics", "strategies"):
        module = __import__(f"cggr_core.{name}", fromlist=[name])
        monkeypatch.setattr(module, "values_are_free", lambda tensor: False)
    logits, targets = logits_and_targets()
    if broken:
        logits[0, 3:6, 2] = torch.nan
        logits[0, 0, 2] = torch.nan  # does not count
    targets[1, 1], targets[1, 2] = V, -7
    settings = {"selection": "random", "min_tokens_ratio": 1.0} if scoring is None else {"scoring": scoring}
    criterion = CGGRLoss(**settings)
    criterion(logits, targets)
    found = criterion._monitor.read(wait=True)
    assert found[:2] == [2.0, reported]
    if broken:
        assert found[2] != found[2]
    else:
        confidence = logits.softmax(-1).amax(-1)[(targets >= 0) & (targets < V)].mean()
        assert found[2] == pytest.approx(confidence.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.ones(B, S, V, dtype=torch.int64)}, TypeError, "^logits must have a floating dtype"),
        (
            {"logits": torch.ones(B, S, 0)},
            ValueError,
            r"^logits must be \[B, S, V\] or \[N, V\], got shape \(2, 9, 0\)",
        ),
        ({"reference_nll": torch.ones(B)}, ValueError, r"^reference_nll must have shape \(2, 9\) \(that of targets\)"),
        ({"token_weight": torch.ones(B)}, ValueError, r"^token_weight must have shape \(2, 9\) \(that of targets\)"),
    ],
)
def test_bad_input_of_the_loss(change, error, message):
    logits, targets = logits_and_targets()
    with pytest.raises(error, match=message):
        CGGRLoss(scoring="excess")(**({"logits": logits, "targets": targets} | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(B, S, H, dtype=torch.int64)}, TypeError, "^hidden must have a floating dtype"),
        ({"hidden": torch.ones(1, B, S, H)}, ValueError, r"^hidden must be \[B, S, H\] or \[N, H\], got shape"),
        ({"weight": torch.ones(V, H + 1)}, ValueError, "^weight"),
        ({"targets": torch.ones(B, 4, dtype=torch.int64)}, ValueError, r"^targets must have shape .* row of hidden"),
        ({"reference_nll": torch.ones(B)}, ValueError, r"^reference_nll must have shape \(2, 9\) \(that of targets\)"),
        ({"token_weight": torch.ones(B)}, ValueError, r"^token_weight must have shape \(2, 9\) \(that of targets\)"),
    ],
)
def test_bad_input_of_the_linear_loss(change, error, message):
    hidden, weight, targets = operands()
    with pytest.raises(error, match=message):
        CGGRLinearLoss(scoring="excess")(**({"hidden": hidden, "weight": weight, "targets": targets} | change))


def test_per_token_tensors_are_checked_by_name():
    targets = torch.zeros(2, 3, dtype=torch.int64)
    check_per_token(targets, token_weight=None, reference_nll=torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"^token_weight must have a floating dtype"):
        check_per_token(targets, token_weight=targets)
    with pytest.raises(ValueError, match=r"^token_weight is on meta but targets is on cpu"):
        check_per_token(targets, token_weight=torch.ones(2, 3, device="meta"))


def test_bad_coefficients():
    mask = torch.ones(2, 3, dtype=torch.bool)
    selection = Selection.from_mask(mask)
    cases = [
        (
            {"countable": mask[:, :2]},
            ValueError,
            r"^countable must have shape \(2, 3\) \(that of the selection's score\)",
        ),
        ({"token_weight": mask}, TypeError, "^token_weight must have a floating dtype"),
        ({"token_weight": torch.ones(2)}, ValueError, r"^token_weight must have shape \(2, 3\) \(one per token\)"),
        ({"token_weight": torch.ones(2, 3, device="meta")}, ValueError, "^token_weight is on meta but countable is on"),
        ({"num_items": "3"}, TypeError, "^num_items must be"),
        ({"num_items": -1}, ValueError, "^num_items must be"),
        ({"num_items": 0}, ValueError, "^num_items must be above 0, got 0: the batch has 6 tokens with a target"),
        ({"num_items": torch.tensor(0)}, ValueError, "^num_items must be above 0, got 0: the batch has 6 tokens"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            loss_coefficients(**({"selection": selection, "countable": mask} | change))


def test_coefficients_are_float32_and_0_where_nothing_is_kept():
    mask = torch.tensor([[True, False, False], [False, False, False]])
    selection = Selection.from_mask(mask, capacity=2)
    weight = torch.tensor([[2.0, torch.nan, torch.inf], [torch.nan] * 3], dtype=torch.float64)
    found = loss_coefficients(selection, torch.ones_like(mask), token_weight=weight, num_items=torch.tensor(4))
    assert found.dtype == torch.float32
    assert found.tolist() == [[3.0, 0.0], [0.0, 0.0]]
    nothing = loss_coefficients(Selection.from_mask(mask & False), mask & False, num_items=torch.tensor(0))
    assert not nothing.any() and nothing.isfinite().all()


def loss_of_rows(hidden, weight, targets, coefficients, bias):
    nll = cross_entropy(linear(hidden, weight, bias), targets, reduction="none")
    return torch.where(coefficients == 0, 0.0, nll * coefficients)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("free", [True, False])
def test_rows_without_weight_count_for_nothing(reduction, free, monkeypatch):
    # Without a look at the weights, as on a device, such rows go through the passes.
    if not free:
        monkeypatch.setattr(linear_loss, "values_are_free", lambda tensor: False)
    hidden, weight = torch.randn(6, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    bias = torch.zeros(V)
    bias[4] = -torch.inf  # a class that cannot be: infinite loss where it is the target
    bias.requires_grad_()
    targets, coefficients = torch.tensor([1, 4, 2, 4, 0, 3]), torch.tensor([0.5, 0.0, 1.0, 0.0, 2.0, 0.0])
    with torch.no_grad():
        hidden[5] = torch.nan
    found = linear_cross_entropy(hidden, weight, targets, row_weight=coefficients, bias=bias, reduction=reduction)
    live = coefficients != 0
    wanted = loss_of_rows(hidden[live], weight, targets[live], coefficients[live], bias)
    upstream = torch.tensor(3.0)
    if reduction == "none":
        assert not found[~live].any()
        torch.testing.assert_close(found[live], wanted)
        upstream = torch.where(live, 3.0, torch.nan)
    else:
        torch.testing.assert_close(found, wanted.sum())
    made = torch.autograd.grad(found, (hidden, weight, bias), upstream)
    for gradient, expected in zip(made, torch.autograd.grad(wanted.sum() * 3, (hidden, weight, bias)), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_values_without_gradients_are_the_same():
    hidden, weight, bias = torch.randn(5, H), torch.randn(V, H, requires_grad=True), torch.randn(V)
    targets = torch.arange(5)
    wanted = cross_entropy(linear(hidden, weight, bias), targets, reduction="none")
    with torch.no_grad():
        for reduction, value in (("sum", wanted.sum()), ("none", wanted)):
            found = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction)
            torch.testing.assert_close(found, value.detach())


def test_weights_of_as_many_rows_as_there_are_go_with_the_used_rows():
    hidden, weight, targets = torch.randn(4, H), torch.randn(V, H), torch.arange(4)
    index, coefficients = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    nll = cross_entropy(linear(hidden, weight), targets, reduction="none")
    found = linear_cross_entropy(hidden, weight, targets, row_index=index, row_weight=coefficients, reduction="none")
    torch.testing.assert_close(found, nll[index] * coefficients)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(4, H).int()}, TypeError, "^hidden must have a floating dtype"),
        ({"row_index": torch.zeros(1, 2, dtype=torch.int64)}, TypeError, r"^row_index must be int64 of shape \[M\]"),
        ({"row_index": torch.zeros(2, dtype=torch.int32)}, TypeError, r"^row_index must be int64 of shape \[M\]"),
        (
            {"row_index": torch.zeros(2, dtype=torch.int64, device="meta")},
            ValueError,
            "^row_index is on meta but hidden",
        ),
        ({"row_index": torch.tensor([0, -1])}, ValueError, r"^row_index must be in \[0, 4\), got values from -1 to 0"),
        ({"row_index": torch.tensor([0, 4])}, ValueError, r"^row_index must be in \[0, 4\), got values from 0 to 4"),
        ({"row_weight": torch.ones(4).int()}, TypeError, "^row_weight must have a floating dtype"),
        ({"row_weight": torch.ones(4, 1)}, ValueError, r"^row_weight must have shape \(4,\) \(one per used row\)"),
        ({"row_weight": torch.ones(3)}, ValueError, r"^row_weight must have shape \(4,\) \(one per used row\)"),
        ({"row_weight": torch.ones(4, device="meta")}, ValueError, "^row_weight is on meta but hidden is on cpu"),
    ],
)
def test_bad_input_of_linear_cross_entropy(change, error, message):
    arguments = {"hidden": torch.randn(4, H), "weight": torch.randn(V, H), "targets": torch.arange(4)} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments)


@pytest.mark.parametrize("make", [CGGRLoss, CGGRLinearLoss])
def test_every_setting_of_the_selection_reaches_it(make, monkeypatch):
    seen = []

    def select(scores, countable, **arguments):
        seen.append(arguments)
        return Selection.from_mask(countable)

    monkeypatch.setattr("cggr_core.token_loss.select", select)
    settings = {"selection": "sequence_aware", "num_strata": 3, "min_tokens_per_sequence": 4, "block_size": 2}
    criterion = make(**settings, unbiased=False, seed=5, min_tokens_ratio=0.2)
    arguments = logits_and_targets() if make is CGGRLoss else operands()
    criterion(*arguments)
    criterion(*arguments, draw=17)
    wanted = {**settings, "unbiased": False, "seed": 5, "ratio": 0.2, "scope": "batch", "capacity": 8}
    assert seen == [wanted | {"draw": 0}, wanted | {"draw": 17}]
    # Of 18 tokens a fifth is 4, and 2 rows of 4 guaranteed ones are 8; no more than there are, however many are wanted.
    make(selection="sequence_aware", min_tokens_per_sequence=100)(*arguments)
    assert seen[-1]["capacity"] == 18
    make(selection="topk", min_tokens_per_sequence=100, min_tokens_ratio=0.2)(*arguments)
    assert seen[-1]["capacity"] == 4


def test_the_state_of_a_loss_is_three_numbers():
    criterion = CGGRLoss(dynamic_threshold=True, warmup_steps=10)
    assert criterion.get_extra_state().tolist()[:2] == [0.0, 0.0]
    assert criterion.get_extra_state()[2].isnan()
    for _ in range(3):
        criterion(*logits_and_targets())
        criterion.step()
    state = criterion.get_extra_state()
    assert state.dtype == torch.float64 and state.tolist()[:2] == [3.0, 3.0] and 0 < state[2] < 1
    other = CGGRLoss(dynamic_threshold=True, warmup_steps=10)
    other.set_extra_state(state)
    assert torch.equal(other.get_extra_state(), state)
    assert other.schedule.ratio == criterion.schedule.ratio
    other.set_extra_state(torch.tensor([1.0, 2.0, torch.nan], dtype=torch.float64))
    assert other.get_extra_state()[2].isnan()
