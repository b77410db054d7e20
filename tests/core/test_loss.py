import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy

from cggr_core import difficulty, head_chunks
from cggr_core.coefficients import loss_coefficients
from cggr_core.loss import CGGRLinearLoss, CGGRLoss
from cggr_core.selection import Selection
from cggr_core.settings import SELECTIONS
from tests.support.allocations import largest_allocation

B, S, V, H = 3, 20, 50, 8


def data(dtype=torch.float32):
    logits = (torch.randn(B, S, V) * 3).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (B, S))
    targets[1, 4:] = -100
    return logits, targets


def linear_data():
    hidden = torch.randn(B, S, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=True)
    return hidden, weight, data()[1]


def full(logits, targets):
    return cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets.reshape(-1))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_kept_is_cross_entropy(selection, dtype):
    logits, targets = data(dtype)
    loss = CGGRLoss(min_tokens_ratio=1.0, selection=selection)(logits, targets)
    assert loss.dtype == torch.float32
    expected = full(logits, targets)
    torch.testing.assert_close(loss, expected)
    (got,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(got, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_everything_kept_is_cross_entropy_of_the_head(selection):
    hidden, weight, targets = linear_data()
    bias = torch.randn(V, requires_grad=True)
    loss = CGGRLinearLoss(min_tokens_ratio=1.0, selection=selection)(
        hidden, weight, targets, bias=bias, softcap=4.0, scale=0.5
    )
    expected = full(4.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 4.0), targets)
    torch.testing.assert_close(loss, expected)
    leaves = (hidden, weight, bias)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("scoring", ["gradnorm", "combined", "excess"])
@pytest.mark.parametrize("block_size", [1, 4])
def test_loss_and_gradient_are_those_of_the_kept_tokens(selection, scoring, block_size):
    logits, targets = data()
    criterion = CGGRLoss(selection=selection, scoring=scoring, block_size=block_size)
    reference_nll = torch.rand(B, S) if scoring == "excess" else None
    loss = criterion(logits, targets, reference_nll=reference_nll)
    made = criterion._last[2]
    nll = cross_entropy(logits.view(-1, V), targets.view(-1), reduction="none")
    expected = (made.weight[0] * nll[made.index[0]])[made.valid[0]].sum() / (targets != -100).sum()
    torch.testing.assert_close(loss, expected)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, logits)[0])
    assert torch.equal(grad.abs().sum(2) > 0, made.mask)
    assert (made.mask <= (targets != -100)).all()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("scoring", ["gradnorm", "entropy"])
def test_both_losses_agree(selection, scoring):
    hidden, weight, targets = linear_data()
    weighting = {"token_weight": torch.rand(B, S), "num_items": 77}
    a = CGGRLoss(selection=selection, scoring=scoring)(hidden @ weight.T, targets, **weighting)
    b = CGGRLinearLoss(selection=selection, scoring=scoring)(hidden, weight, targets, **weighting)
    torch.testing.assert_close(a, b)
    leaves = (hidden, weight)
    torch.testing.assert_close(torch.autograd.grad(a, leaves), torch.autograd.grad(b, leaves))


@pytest.mark.parametrize("selection", ["stratified", "sampled", "random"])
def test_the_loss_is_unbiased(selection):
    logits, targets = data()
    criterion = CGGRLoss(selection=selection, min_tokens_ratio=0.3)
    losses = torch.stack([criterion(logits, targets).detach() for _ in range(300)])
    error = losses.std() / 300**0.5
    assert abs(losses.mean() - full(logits, targets)) <= 4.5 * error


def test_flat_input_and_any_strides():
    logits, targets = data()
    flat = CGGRLoss()(logits.view(-1, V), targets.view(-1))
    torch.testing.assert_close(flat, CGGRLoss()(logits, targets))
    sliced = CGGRLoss()(logits[:, :-1], targets[:, 1:])
    torch.testing.assert_close(sliced, CGGRLoss()(logits[:, :-1].contiguous(), targets[:, 1:]))
    (got,) = torch.autograd.grad(sliced, logits)
    assert (got[:, -1] == 0).all() and (got != 0).any()
    hidden, weight, targets = linear_data()
    flat = CGGRLinearLoss()(hidden.view(-1, H), weight, targets.view(-1))
    torch.testing.assert_close(flat, CGGRLinearLoss()(hidden, weight, targets))


@pytest.mark.parametrize("shape", [(2, 5), (2, 0), (0, 5), (1, 1)])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_nothing_countable_is_a_connected_zero(shape, selection):
    logits, targets = torch.randn(*shape, V, requires_grad=True), torch.full(shape, -100)
    loss = CGGRLoss(selection=selection)(logits, targets)
    assert loss.item() == 0.0
    loss.backward()
    assert (logits.grad == 0).all()
    hidden, weight = torch.randn(*shape, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    criterion = CGGRLinearLoss(selection=selection)
    loss = criterion(hidden, weight, targets)
    assert loss.item() == 0.0
    loss.backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()
    assert all(value.isfinite() for value in criterion.metrics.values())


def test_token_weights_multiply_in():
    logits, targets = data()
    token_weight = torch.rand(B, S)
    loss = CGGRLoss(min_tokens_ratio=1.0)(logits, targets, token_weight=token_weight)
    nll = cross_entropy(logits.view(-1, V), targets.view(-1), reduction="none").view(B, S)
    torch.testing.assert_close(loss, (nll * token_weight).sum() / (targets != -100).sum())
    token_weight[targets == -100] = float("nan")  # what is not countable is never used
    assert torch.equal(CGGRLoss(min_tokens_ratio=1.0)(logits, targets, token_weight=token_weight), loss)
    hidden, weight, targets = linear_data()
    token_weight = torch.rand(B, S)
    loss = CGGRLinearLoss(min_tokens_ratio=1.0)(hidden, weight, targets, token_weight=token_weight)
    torch.testing.assert_close(
        loss, CGGRLoss(min_tokens_ratio=1.0)(hidden @ weight.T, targets, token_weight=token_weight)
    )


def test_a_weight_of_zero_silences_an_infinite_loss():
    logits, targets = data()
    token_weight = torch.ones(B, S)
    token_weight[0, 0] = 0.0
    with torch.no_grad():
        logits[0, 0, targets[0, 0]] = -float("inf")
    loss = CGGRLoss(min_tokens_ratio=1.0)(logits, targets, token_weight=token_weight)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_accumulation_with_num_items_is_one_batch():
    logits, targets = data()
    whole = full(logits, targets)
    items = (targets != -100).sum()
    criterion = CGGRLoss(min_tokens_ratio=1.0)
    parts = [criterion(logits[i : i + 1], targets[i : i + 1], num_items=items) for i in range(B)]
    torch.testing.assert_close(sum(parts), whole)


def test_eval_is_the_full_mean_and_draws_nothing():
    logits, targets = data()
    criterion = CGGRLoss(min_tokens_ratio=0.25).eval()
    torch.testing.assert_close(criterion(logits, targets), full(logits, targets))
    torch.testing.assert_close(criterion(logits[:, 1:], targets[:, 1:]), full(logits[:, 1:], targets[:, 1:]))
    assert criterion.schedule.next_draw() == 0
    hidden, weight, targets = linear_data()
    expected = full(hidden @ weight.T, targets)
    torch.testing.assert_close(CGGRLinearLoss().eval()(hidden, weight, targets), expected)


def test_metrics():
    logits, targets = data()
    criterion = CGGRLoss(selection="topk", scoring="loss", min_tokens_ratio=0.5)
    assert criterion.metrics == {}
    loss = criterion(logits, targets)
    metrics = criterion.metrics
    assert all(isinstance(value, torch.Tensor) and value.dim() == 0 for value in metrics.values())
    assert metrics["loss"] == loss and not metrics["loss"].requires_grad
    assert metrics["kept_tokens"] == 22 and metrics["countable_tokens"] == 44
    assert metrics["keep_ratio"] == 0.5
    torch.testing.assert_close(metrics["full_loss"], full(logits, targets))
    nll = cross_entropy(logits.view(-1, V), targets.view(-1), reduction="none")[targets.view(-1) != -100]
    hardest = nll.sort(descending=True).values
    torch.testing.assert_close(metrics["score_kept"], hardest[:22].mean())
    torch.testing.assert_close(metrics["score_dropped"], hardest[22:].mean())
    confidence = logits.softmax(-1).amax(-1)[targets != -100].mean()
    torch.testing.assert_close(metrics["confidence"], confidence)
    random = CGGRLoss(selection="random")
    random(logits, targets)
    assert set(random.metrics) == {"loss", "keep_ratio", "kept_tokens", "countable_tokens"}


def test_random_selection_scores_nothing(monkeypatch):
    def never(*arguments, **more):
        raise AssertionError("scored")

    monkeypatch.setattr("cggr_core.loss.token_statistics", never)
    monkeypatch.setattr("cggr_core.loss.linear_token_statistics", never)
    CGGRLoss(selection="random")(*data())
    CGGRLinearLoss(selection="random")(*linear_data())


def test_step_moves_the_ratio():
    logits, targets = data()
    criterion = CGGRLoss(min_tokens_ratio=0.25, warmup_steps=2)
    kept = []
    for _ in range(4):
        criterion(logits, targets)
        kept.append(int(criterion.metrics["kept_tokens"]))
        criterion.step()
    assert kept == [44, round(0.625 * 44), 11, 11]


def test_without_a_step_it_starts_at_its_ratio():
    criterion = CGGRLoss(min_tokens_ratio=0.25)
    criterion(*data())
    assert criterion.metrics["keep_ratio"] == 0.25


def test_the_confidence_of_the_batch_before_moves_the_ratio():
    targets = data()[1]
    sure, unsure = torch.zeros(B, S, V), torch.zeros(B, S, V)
    sure[..., 0] = 50.0
    criterion = CGGRLoss(min_tokens_ratio=0.4, dynamic_threshold=True, threshold_sensitivity=1.0)
    kept = []
    for logits in (sure, unsure, unsure):
        criterion(logits, targets)
        kept.append(criterion.metrics["keep_ratio"].item())
    assert kept[0] == pytest.approx(0.4, abs=0.02)
    assert kept[1] == pytest.approx(0.4 * 2.718281828**-0.5, abs=0.02)
    assert kept[2] == pytest.approx(0.4 * 2.718281828**0.48, abs=0.02)
    random = CGGRLoss(selection="random", min_tokens_ratio=0.4, dynamic_threshold=True, threshold_sensitivity=1.0)
    random(sure, targets)
    random(sure, targets)
    assert random.metrics["keep_ratio"].item() == pytest.approx(kept[1])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_resumed_run_makes_the_selections_of_the_uninterrupted_one(selection):
    batches = [data() for _ in range(6)]

    def run(criterion, part):
        masks = []
        for logits, targets in part:
            criterion(logits, targets)
            masks.append(criterion._last[2].mask)
            criterion.step()
        return masks

    def make():
        return CGGRLoss(selection=selection, warmup_steps=4, dynamic_threshold=True, threshold_sensitivity=2.0, seed=3)

    uninterrupted = run(make(), batches)
    first = make()
    run(first, batches[:3])
    resumed = make()
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    for a, b in zip(run(resumed, batches[3:]), uninterrupted[3:], strict=True):
        assert torch.equal(a, b)
    assert all(isinstance(value, torch.Tensor) for value in first.state_dict().values())


def test_a_draw_can_be_given():
    logits, targets = data()
    criterion = CGGRLoss()
    draw = torch.tensor(5)
    criterion(logits, targets, draw=draw)
    first = criterion._last[2].mask
    criterion(logits, targets, draw=5)
    assert torch.equal(first, criterion._last[2].mask)
    assert criterion.schedule.next_draw() == 0


@pytest.mark.parametrize("tokens", [64, 2048])
def test_the_linear_loss_never_holds_all_logits(tokens, monkeypatch):
    monkeypatch.setattr(difficulty, "_CPU_HEAD_CHUNK", 4096)
    monkeypatch.setattr(difficulty, "_CPU_CHUNK", 4096)
    monkeypatch.setattr(head_chunks, "_CPU_CHUNK", 4096)
    hidden, weight = torch.randn(1, tokens, 2, requires_grad=True), torch.randn(256, 2, requires_grad=True)
    targets = torch.randint(0, 256, (1, tokens))
    criterion = CGGRLinearLoss()
    assert largest_allocation(lambda: criterion(hidden, weight, targets).backward()) <= max(4096, 2 * tokens)


# torch's own tracer instantiates the Function, and warns that one should not.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "selection"), [(CGGRLoss, "stratified"), (CGGRLinearLoss, "stratified"), (CGGRLoss, "random")]
)
def test_compiles_as_one_graph(make, selection):
    torch.compiler.reset()
    hidden, weight, targets = linear_data()
    leaves = (hidden, weight) if make is CGGRLinearLoss else ((hidden @ weight.T).detach().requires_grad_(),)
    eager, compiled = make(selection=selection), make(selection=selection)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled, fullgraph=True, backend=counter)
    for _ in range(3):
        a, b = eager(*leaves, targets), step(*leaves, targets)
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(torch.autograd.grad(a, leaves), torch.autograd.grad(b, leaves))
        eager.step(), compiled.step()
    assert counter.frame_count == 1  # neither draws nor steps compile anew
    assert compiled.schedule.state_dict() == eager.schedule.state_dict()


def test_autocast_of_the_linear_loss():
    hidden, weight, targets = linear_data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = CGGRLinearLoss(min_tokens_ratio=1.0)(hidden, weight, targets)
    torch.testing.assert_close(loss, full(hidden.bfloat16() @ weight.bfloat16().T, targets))
    loss.backward()
    assert hidden.grad.dtype == torch.float32


def test_loss_coefficients_by_hand():
    mask = torch.tensor([[True, False, True, False], [False, True, False, False]])
    countable = torch.ones(2, 4, dtype=torch.bool)
    made = Selection.from_mask(mask, countable=countable, weight=torch.full((2, 4), 2.0), capacity=2)
    assert loss_coefficients(made, countable).tolist() == [[0.25, 0.25], [0.0, 0.25]]
    token_weight = torch.arange(8.0).view(2, 4)
    weighted = loss_coefficients(made, countable, token_weight=token_weight, num_items=2)
    assert weighted.tolist() == [[0.0, 2.0], [0.0, 5.0]]
    on_device = loss_coefficients(made, countable, num_items=torch.tensor(4))
    assert on_device.tolist() == [[0.5, 0.5], [0.0, 0.5]]
    with pytest.raises(ValueError, match=r"num_items must be above 0, got 0"):
        loss_coefficients(made, countable, num_items=0)
    with pytest.raises(ValueError, match=r"token_weight must have shape \(2, 4\) \(one per token\), got \(2, 3\)"):
        loss_coefficients(made, countable, token_weight=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"countable must have shape \(2, 4\)"):
        loss_coefficients(made, countable[:1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scoring": "combind"}, ValueError, r"scoring must be one of .*did you mean 'combined'"),
        ({"selection": "stratfied"}, ValueError, r"selection must be one of .*did you mean 'stratified'"),
        ({"min_tokens_ratio": 1.5}, ValueError, r"min_tokens_ratio must be in \(0, 1\], got 1.5"),
        ({"num_strata": 0}, ValueError, "num_strata must be at least 1, got 0"),
        ({"seed": 1.5}, TypeError, "seed must be an integer"),
    ],
)
@pytest.mark.parametrize("make", [CGGRLoss, CGGRLinearLoss])
def test_bad_settings(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_settings_are_keyword_only():
    with pytest.raises(TypeError):
        CGGRLoss("gradnorm")


def test_bad_input_changes_nothing():
    logits, targets = data()
    criterion = CGGRLoss()
    outside = targets.clone()
    outside[0, :2] = V
    nan = logits.detach().clone()
    nan[0, 0, 3] = float("nan")
    cases = [
        ((logits, outside), {}, r"targets holds 2 value\(s\) outside the vocabulary \(the first is 50\)"),
        ((nan, targets), {}, "logits are NaN, or have no finite maximum, at 1 of 60 positions"),
        (
            (logits, targets[:, 1:]),
            {},
            r"targets must have shape \(3, 20\) \(one target per row of logits\), got \(3, 19\)",
        ),
        ((logits[0, 0], targets[0, 0]), {}, r"logits must be \[B, S, V\] or \[N, V\], got shape \(50,\)"),
        (
            (logits, targets),
            {"token_weight": torch.ones(B)},
            r"token_weight must have shape \(3, 20\) \(that of targets\)",
        ),
        ((logits, targets), {"reference_nll": torch.ones(B, S)}, "reference_nll is used only by scoring='excess'"),
        ((logits, targets.to("meta")), {}, "targets is on meta but logits is on cpu"),
    ]
    for arguments, more, message in cases:
        with pytest.raises(ValueError, match=message):
            criterion(*arguments, **more)
    with pytest.raises(ValueError, match="scoring='excess' needs reference_nll"):
        CGGRLoss(scoring="excess")(logits, targets)
    assert criterion.schedule.next_draw() == 0
    assert criterion.metrics == {}
    with pytest.raises(ValueError, match="the loss is NaN: logits are NaN, or infinite, at a kept position"):
        CGGRLoss(selection="random", min_tokens_ratio=1.0)(nan, targets)


def test_what_a_device_reported_is_raised_by_the_next_forward():
    # On a device the counts come through the monitor; here they are put there.
    logits, targets = data()
    for counts, message in (
        (
            [2.0, 0.0, 0.5],
            r"in an earlier step, targets holds 2 value\(s\) outside the vocabulary: accepted are 0 to 49",
        ),
        ([0.0, 3.0, 0.5], r"in an earlier step, logits were NaN at 3 countable position\(s\)"),
    ):
        criterion = CGGRLoss()
        criterion(logits, targets)
        criterion._monitor.post(torch.tensor(counts))
        with pytest.raises(ValueError, match=message):
            criterion(logits, targets)
        criterion(logits, targets)


def test_repr_says_what_it_does():
    assert "selection='stratified'" in repr(CGGRLoss())
