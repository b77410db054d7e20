import pytest
import torch

import cggr_kernels._linear_cross_entropy_chunks as module
from cggr_core.linear_loss import linear_cross_entropy_by_autograd
from cggr_kernels.linear_cross_entropy import linear_cross_entropy


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks of classes at the sizes the interpreter can bear, the last one not full."""
    monkeypatch.setattr(module, "MIN_COLUMNS", 48)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1)


def problem(N, H, V, dtype, device, *, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(size, H, generator=generator).to(device, dtype) for size in (N, V))
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[::3] = -100
    head_bias = torch.randn(V, generator=generator).to(device, dtype) if bias else None
    return hidden, weight * 0.5, targets.to(device), head_bias


def run(function, hidden, weight, targets, row_index, row_weight, bias, *rest, upstream=None):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    loss = function(
        leaves[0], leaves[1], targets, row_index, row_weight, leaves[2] if bias is not None else None, *rest
    )
    return loss.detach(), *torch.autograd.grad(loss, leaves, upstream)


def check_against_truth(hidden, weight, targets, row_index, row_weight, bias, *rest, upstream=None):
    """Loss and gradients no further from float64 than torch in the same dtype, by relative norm."""
    tolerance = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[hidden.dtype]
    operands = (hidden, weight, targets, row_index, row_weight, bias)
    numbers = rest[:4]  # what follows says how much memory may be used
    values = run(linear_cross_entropy, *operands, *rest, upstream=upstream)
    rivals = run(linear_cross_entropy_by_autograd, *operands, *numbers, upstream=upstream)
    doubles = [x.double() if x is not None and x.is_floating_point() else x for x in operands]
    upstream = None if upstream is None else upstream.double()
    truths = run(linear_cross_entropy_by_autograd, *doubles, *numbers, upstream=upstream)
    for place, (value, rival, truth) in enumerate(zip(values, rivals, truths, strict=True)):
        assert value.dtype == (torch.float32 if place == 0 else hidden.dtype)
        error, rival_error = (value.double() - truth).norm(), (rival.double() - truth).norm()
        assert error <= rival_error + tolerance * truth.norm(), (place, error / truth.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("N", "H", "V"), [(1, 1, 2), (7, 16, 257), (20, 33, 96), (2, 5, 47)])
def test_loss_and_gradients(N, H, V, dtype, device):
    hidden, weight, targets, bias = problem(N, H, V, dtype, device, bias=True)
    targets[0] = 1
    check_against_truth(hidden, weight, targets, None, None, None)
    check_against_truth(hidden, weight, targets, None, None, bias)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_rows_weights_softcap_and_scale(softcap, scale, reduction, device):
    hidden, weight, targets, bias = problem(20, 16, 130, torch.float32, device, bias=True)
    row_index = torch.tensor([1, 2, 3, 7, 8, 19, 0], device=device)
    row_weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 1e-3, 3.0, 1.0], device=device)
    upstream = None if reduction == "sum" else torch.randn(7, device=device)
    rest = (softcap, scale, -100, reduction)
    check_against_truth(hidden, weight, targets, row_index, row_weight, bias, *rest, upstream=upstream)
    everywhere = torch.rand(20, device=device)
    check_against_truth(hidden, weight, targets, row_index, everywhere, None, *rest, upstream=upstream)


@pytest.mark.parametrize(("M", "H"), [(5, 16), (16, 16), (17, 16), (13, 5)])
@pytest.mark.parametrize("factor", [1.0, -2.5])
def test_sums_with_logits_in_the_place_of_the_gradient(M, H, factor, device):
    """All chunks, every second or every third fits; the upstream gradient scales every gradient."""
    hidden, weight, targets, bias = problem(M, H, 200, torch.float32, device, bias=True)
    upstream = torch.tensor(factor, device=device)
    for max_logits in (None, M * 200):
        rest = (None, None, -100, "sum", max_logits)
        check_against_truth(hidden, weight, targets, None, None, bias, *rest, upstream=upstream)


@pytest.mark.parametrize(("N", "M", "H"), [(60, 8, 16), (32, 8, 16), (112, 32, 16), (6, 9, 16)])
def test_sums_whose_gradients_lend_their_memory(N, M, H, device):
    """A whole chunk fits besides the rows, half of one, with fewer chunks kept, and nothing; rows in any order."""
    hidden, weight, targets, bias = problem(N, H, 200, torch.float32, device, bias=True)
    row_index = torch.randperm(N, device=device)[:M] if M <= N else torch.arange(M, device=device) % N
    row_weight = torch.rand(M, device=device)
    check_against_truth(hidden, weight, targets, row_index, row_weight, bias)


def test_the_graph_of_a_sum_is_walked_once(device):
    hidden, weight, targets, _ = problem(6, 8, 100, torch.float32, device)
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_second_derivatives_are_refused_not_zero(reduction, device):
    hidden, weight, targets, _ = problem(5, 8, 50, torch.float32, device)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_rows_without_weight_may_hold_anything(device):
    hidden, weight, targets, _ = problem(6, 8, 100, torch.float32, device)
    hidden[0], hidden[4] = float("nan"), float("inf")
    targets[4], targets[1] = 5, 7
    row_weight = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0], device=device)
    loss, d_hidden, d_weight = run(linear_cross_entropy, hidden, weight, targets, None, row_weight, None)
    for value in (loss, d_hidden, d_weight):
        assert torch.isfinite(value).all()
    assert (d_hidden[[0, 3, 4]] == 0).all()


def test_nothing_to_learn_gives_a_connected_zero(device):
    hidden, weight, targets, _ = problem(6, 8, 100, torch.float32, device)
    none = torch.empty(0, dtype=torch.int64, device=device)
    for target, row_index in ((torch.full_like(targets, -100), None), (targets, none)):
        loss, d_hidden, d_weight = run(linear_cross_entropy, hidden, weight, target, row_index, None, None)
        assert loss == 0
        assert d_hidden.shape == hidden.shape
        assert (d_hidden == 0).all()
        assert (d_weight == 0).all()


def test_only_the_gradients_that_are_wanted(device):
    hidden, weight, targets, _ = problem(6, 8, 100, torch.float32, device)
    expected = run(linear_cross_entropy, hidden, weight, targets, None, None, None)
    for place, name in ((1, "hidden"), (2, "weight")):
        operands = {"hidden": hidden.detach().clone(), "weight": weight.detach().clone()}
        leaf = operands[name].requires_grad_()
        loss = linear_cross_entropy(operands["hidden"], operands["weight"], targets)
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected[place])
    assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_impossible_targets_and_rows_give_nan(device):
    hidden, weight, targets, _ = problem(6, 8, 100, torch.float32, device)
    assert linear_cross_entropy(hidden, weight, targets.clamp_min(0) + 100).isnan()
    losses = linear_cross_entropy(
        hidden, weight, targets.clamp_min(0), torch.tensor([0, 6, -1], device=device), reduction="none"
    )
    assert losses.isnan().tolist() == [False, True, True]


def test_autocast_computes_in_its_dtype(device):
    hidden, weight, targets, _ = problem(6, 8, 100, torch.float32, device)
    leaf = weight.requires_grad_()
    dtype = torch.bfloat16
    with torch.autocast(device, dtype=dtype):
        loss = linear_cross_entropy(hidden, leaf, targets)
    assert loss.dtype == torch.float32
    assert loss == linear_cross_entropy(hidden.to(dtype), weight.to(dtype), targets)
    assert torch.autograd.grad(loss, leaf)[0].dtype == torch.float32


def test_bad_input_is_named(device):
    hidden, weight, targets, bias = problem(6, 8, 100, torch.float32, device, bias=True)
    with pytest.raises(ValueError, match=r"weight must be \[V, 8\]"):
        linear_cross_entropy(hidden, weight[:, 1:], targets)
    with pytest.raises(TypeError, match=r"weight must have the dtype of hidden, got torch\.float16"):
        linear_cross_entropy(hidden, weight.half(), targets)
    with pytest.raises(ValueError, match="targets must have shape"):
        linear_cross_entropy(hidden, weight, targets[1:])
    with pytest.raises(TypeError, match="row_index must be int64"):
        linear_cross_entropy(hidden, weight, targets, targets.int())
    with pytest.raises(ValueError, match="row_weight must have shape"):
        linear_cross_entropy(hidden, weight, targets, None, torch.ones(5, device=device))
    with pytest.raises(ValueError, match="row_weight requires a gradient"):
        linear_cross_entropy(hidden, weight, targets, None, torch.ones(6, device=device, requires_grad=True))
    with pytest.raises(ValueError, match="bias must have shape"):
        linear_cross_entropy(hidden, weight, targets, None, None, bias[1:])
    with pytest.raises(ValueError, match="reduction must be one of"):
        linear_cross_entropy(hidden, weight, targets, reduction="mean")
    with pytest.raises(ValueError, match="softcap must be a positive"):
        linear_cross_entropy(hidden, weight, targets, softcap=0.0)
    with pytest.raises(ValueError, match="got meta and cpu"):
        linear_cross_entropy(hidden, weight, targets.to("meta"))


def test_op_registration(device):
    hidden, weight, targets, bias = problem(6, 8, 100, torch.float32, device, bias=True)
    ops = torch.ops.cggr_kernels
    targets = targets.clamp_min(0)
    torch.library.opcheck(ops.linear_cross_entropy.default, (hidden, weight, targets, bias, 3.0, None))
    _, lse = ops.linear_cross_entropy(hidden, weight, targets, None, None, 2.0)
    arguments = (hidden, weight, targets, None, lse, torch.rand(6, device=device), None, 2.0)
    torch.library.opcheck(ops.linear_cross_entropy_gradient.default, (*arguments, [True, True, False]))
    torch.library.opcheck(ops.linear_cross_entropy_scale_.default, (weight, torch.tensor(0.5, device=device)))
    arguments = (hidden, weight, targets, None, bias, torch.rand(6, device=device), 3.0, None, 100)
    for needs in ([True, True, True], [True, False, False], [False, True, False]):
        torch.library.opcheck(ops.linear_cross_entropy_sum.default, (*arguments, needs))


def test_compiles_as_one_graph(device, compiler):
    hidden, weight, targets, _ = problem(6, 8, 100, torch.float32, device)
    row_index = torch.tensor([1, 2, 4], device=device)
    compiled = torch.compile(lambda h, *rest: linear_cross_entropy(h * 1.0, *rest), fullgraph=True, backend=compiler)
    values = run(compiled, hidden, weight, targets, row_index, None, None)
    for value, expected in zip(
        values, run(linear_cross_entropy, hidden, weight, targets, row_index, None, None), strict=True
    ):
        torch.testing.assert_close(value, expected)
