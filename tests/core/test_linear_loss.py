import pytest
import torch

from cggr_core import backends, head_chunks
from cggr_core.linear_loss import linear_cross_entropy, linear_cross_entropy_by_autograd
from tests.support.allocations import largest_allocation
from tests.support.linear_heads import KINDS, operands

REDUCTIONS = ("sum", "none")


@pytest.fixture(autouse=True)
def _many_chunks(monkeypatch):
    monkeypatch.setattr(head_chunks, "_CPU_CHUNK", 100)


def by_autograd(
    hidden, weight, targets, reduction="sum", row_index=None, row_weight=None, bias=None, softcap=None, scale=None
):
    return linear_cross_entropy_by_autograd(
        hidden, weight, targets, row_index, row_weight, bias, softcap, scale, -100, reduction
    )


def gradients(loss, leaves, upstream):
    return torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None], upstream, retain_graph=True)


def rows_of(kind, N):
    if kind == "all":
        return {}
    if kind == "weighted":
        return {"row_weight": torch.rand(N) + 0.1}
    index = torch.tensor([6, 0, 2, 3])
    if kind == "indexed":
        return {"row_index": index, "row_weight": torch.tensor([0.5, 0.0, 1.0, 3.0])}
    if kind == "repeated":
        return {"row_index": torch.tensor([1, 1, 4])}
    return {"row_index": index, "row_weight": torch.rand(N) + 0.1}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ["all", "weighted", "indexed", "repeated", "weighted_by_token"])
def test_equals_plain_autograd(reduction, kind, rows):
    hidden, weight, targets, head = operands(kind=kind)
    chosen = rows_of(rows, 7)
    got = linear_cross_entropy(hidden, weight, targets, reduction=reduction, **chosen, **head)
    expected = by_autograd(hidden, weight, targets, reduction, **chosen, **head)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(got)  # not uniform
    leaves = (hidden, weight, head.get("bias"))
    torch.testing.assert_close(gradients(got, leaves, upstream), gradients(expected, leaves, upstream))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", [linear_cross_entropy, by_autograd])
def test_gradcheck(reduction, kind, function):
    hidden, weight, targets, head = operands(N=4, H=3, V=9, kind=kind)
    bias = head.pop("bias", None)
    index, row_weight = torch.tensor([3, 0, 1]), torch.tensor([0.5, 2.0, 0.0], dtype=torch.float64)

    def loss(hidden, weight, *bias):
        return function(
            hidden,
            weight,
            targets,
            row_index=index,
            row_weight=row_weight,
            bias=bias[0] if bias else None,
            reduction=reduction,
            **head,
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight) if bias is None else (hidden, weight, bias))


def test_by_hand():
    hidden, weight = torch.zeros(2, 3, requires_grad=True), torch.zeros(4, 3, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1, 2]), row_weight=torch.tensor([1.0, 0.5]))
    assert loss.item() == pytest.approx(1.5 * torch.tensor(4.0).log().item())
    weight = torch.eye(2).requires_grad_()
    hidden = torch.tensor([[0.0, 0.0]], requires_grad=True)
    linear_cross_entropy(hidden, weight, torch.tensor([0])).backward()
    assert hidden.grad.tolist() == [[-0.5, 0.5]]  # softmax minus one-hot, through the identity
    assert weight.grad.tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_operands_cost_no_gradient(reduction, frozen):
    hidden, weight, targets, _ = operands()
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    if frozen == "both":
        assert not loss.requires_grad
        return
    loss.backward()
    leaf = hidden if frozen == "weight" else weight
    (expected,) = torch.autograd.grad(by_autograd(hidden, weight, targets), leaf)
    torch.testing.assert_close(leaf.grad, expected)
    assert (weight if frozen == "weight" else hidden).grad is None


def test_no_grad_and_inference_mode():
    hidden, weight, targets, _ = operands()
    expected = linear_cross_entropy(hidden, weight, targets).detach()
    with torch.no_grad():
        assert largest_allocation(lambda: linear_cross_entropy(hidden, weight, targets)) <= 100
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), expected)
    with torch.inference_mode():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_dead_rows_may_hold_anything(reduction):
    hidden, weight, targets, _ = operands(dtype=torch.float32)
    with torch.no_grad():
        hidden[2], hidden[4] = float("nan"), float("inf")  # row 2 is ignored, row 4 gets weight 0
    row_weight = torch.ones(7)
    row_weight[4] = 0.0
    loss = linear_cross_entropy(hidden, weight, targets, row_weight=row_weight, reduction=reduction)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert (hidden.grad[[2, 4]] == 0).all()
    assert (hidden.grad[[0, 1, 3, 5, 6]] != 0).any(1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(1, 8, 7), (7, 8, 257), (257, 8, 1), (33, 16, 1000)])
def test_no_further_from_the_truth_than_autograd(dtype, reduction, shape):
    hidden, weight, targets, _ = operands(*shape, dtype=dtype)
    exact = by_autograd(hidden.double(), weight.double(), targets, reduction)
    upstream = torch.rand_like(exact)
    truth = [exact, *gradients(exact, (hidden, weight), upstream)]
    errors = []
    for function in (linear_cross_entropy, by_autograd):
        loss = function(hidden, weight, targets, reduction=reduction)
        assert loss.dtype == torch.float32
        found = [loss, *gradients(loss, (hidden, weight), upstream.float())]
        errors.append([(a.double() - b.double()).norm() for a, b in zip(found, truth, strict=True)])
        assert found[1].dtype == found[2].dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, theirs, value in zip(*errors, truth, strict=True):
        assert ours <= 1.1 * theirs + tolerance * (1e-2 + value.double().norm())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_autocast(reduction):
    hidden, weight, targets, _ = operands(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    assert loss.dtype == torch.float32
    loss.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    low_hidden, low_weight = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    expected = linear_cross_entropy(low_hidden, low_weight, targets, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    expected.sum().backward()
    torch.testing.assert_close(weight.grad.bfloat16(), low_weight.grad)
    # The gradient of a float32 weight is accumulated in float32 and not rounded on the way.
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


def test_extremes():
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, 0, 1]), reduction="none")
    torch.testing.assert_close(
        loss, torch.tensor([0.0, 2e4, 2**0.5]).where(torch.tensor([True, True, False]), torch.tensor(2.0).log())
    )
    loss.sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", ["no rows", "no index", "all ignored", "one class"])
def test_nothing_to_learn_is_a_connected_zero(reduction, case):
    hidden, weight, targets, _ = operands(
        *((0, 5, 9) if case == "no rows" else (7, 5, 1 if case == "one class" else 9))
    )
    index = torch.zeros(0, dtype=torch.long) if case == "no index" else None
    if case == "all ignored":
        targets.fill_(-100)
    loss = linear_cross_entropy(hidden, weight, targets, row_index=index, reduction=reduction).sum()
    assert loss.item() == 0.0
    loss.backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_the_graph_can_be_walked_twice():
    hidden, weight, targets, _ = operands()
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, weight, torch.tensor(2.0), retain_graph=True)[0]
    second = torch.autograd.grad(loss, weight, torch.tensor(3.0))[0]
    torch.testing.assert_close(first / 2, second / 3)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_strided_operands(reduction):
    hidden, weight, targets, _ = operands()
    strided = linear_cross_entropy(
        hidden.T.contiguous().T, weight.T.contiguous().T, targets.repeat_interleave(2)[::2], reduction=reduction
    )
    torch.testing.assert_close(strided, linear_cross_entropy(hidden, weight, targets, reduction=reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("N", [64, 1024])
def test_memory_is_a_chunk_and_the_gradients(reduction, N, monkeypatch):
    monkeypatch.setattr(head_chunks, "_CPU_CHUNK", 1000)
    hidden, weight, targets, _ = operands(N, 4, 250, dtype=torch.float32)

    def step():
        linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum().backward()

    assert largest_allocation(step) <= max(1000, N * 4)  # [N, V] would be 62 times as much


def test_sum_makes_three_products_and_none_four():
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, targets, _ = operands(64, 8, 30, dtype=torch.float32)
    targets = targets.clamp(min=0)
    product = 2 * 64 * 8 * 30
    for reduction, products in (("sum", 3), ("none", 4)):
        with FlopCounterMode(display=False) as counter:
            linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum().backward()
        assert counter.get_total_flops() == products * product
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(hidden, weight, targets.masked_fill(torch.arange(64) < 48, -100)).backward()
    assert counter.get_total_flops() == 3 * product // 4  # ignored rows are not computed


# torch's own tracer instantiates the Function, and warns that one should not.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_compiles_as_one_graph(reduction, kind):
    torch.compiler.reset()
    hidden, weight, targets, head = operands(dtype=torch.float32, kind=kind)
    index, row_weight = torch.tensor([0, 2, 5]), torch.tensor([1.0, 2.0, 3.0])

    def loss(hidden, weight):
        return linear_cross_entropy(
            hidden, weight, targets, row_index=index, row_weight=row_weight, reduction=reduction, **head
        ).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = compiled(hidden, weight), loss(hidden, weight)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.autograd.grad(a, (hidden, weight)), torch.autograd.grad(b, (hidden, weight)))


def test_a_kernel_is_used_where_there_is_one(monkeypatch):
    calls = []

    def kernel(*arguments):
        calls.append(arguments)
        return linear_cross_entropy_by_autograd(*arguments[:-1])

    monkeypatch.setitem(backends._registry.kernels, ("linear_cross_entropy", "cpu"), ("test", kernel))
    hidden, weight, targets, _ = operands(dtype=torch.float32)
    linear_cross_entropy(hidden, weight, targets, scale=2.0, reduction="none", max_logits=50)
    assert calls[0][3:] == (None, None, None, None, 2.0, -100, "none", 50)
    linear_cross_entropy(hidden.double(), weight.double(), targets)
    assert len(calls) == 1  # float64 is the reference's


def test_bad_arguments():
    hidden, weight, targets, _ = operands()
    with pytest.raises(ValueError, match=r"hidden must be \[N, H\], got shape \(1, 7, 5\)"):
        linear_cross_entropy(hidden[None], weight, targets)
    with pytest.raises(
        ValueError, match=r"targets must have shape \(7,\) \(one target per row of hidden\), got \(6,\)"
    ):
        linear_cross_entropy(hidden, weight, targets[:6])
    with pytest.raises(ValueError, match=r"targets holds 1 value\(s\) outside the vocabulary \(the first is 23\)"):
        linear_cross_entropy(hidden, weight, targets.index_fill(0, torch.tensor([1]), 23))
    with pytest.raises(ValueError, match="reduction must be one of 'sum', 'none', got 'mean'"):
        linear_cross_entropy(hidden, weight, targets, reduction="mean")
    with pytest.raises(TypeError, match=r"row_index must be int64 of shape \[M\], got torch\.int32 of shape \(1,\)"):
        linear_cross_entropy(hidden, weight, targets, row_index=torch.tensor([1], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"row_index must be in \[0, 7\), got values from -1 to 7"):
        linear_cross_entropy(hidden, weight, targets, row_index=torch.tensor([-1, 7]))
    with pytest.raises(ValueError, match=r"row_weight must have shape \(7,\) \(one per used row\), got \(3,\)"):
        linear_cross_entropy(hidden, weight, targets, row_weight=torch.ones(3))
    with pytest.raises(ValueError, match=r"row_weight requires a gradient, .*pass row_weight\.detach\(\)"):
        linear_cross_entropy(hidden, weight, targets, row_weight=torch.ones(7, requires_grad=True))
    with pytest.raises(TypeError, match=r"hidden is torch\.float32 but weight is torch\.float64"):
        linear_cross_entropy(hidden.float(), weight, targets)
    with pytest.raises(ValueError, match="targets is on meta but hidden is on cpu"):
        linear_cross_entropy(hidden, weight, targets.to("meta"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_float16_gradients_under_a_loss_scale(reduction):
    """Small gradients survive until the loss scale reaches them."""
    vocabulary, rows = 4000, 64
    hidden = torch.randn(rows, 16, dtype=torch.float16).double().requires_grad_()
    weight = (torch.randn(vocabulary, 16, dtype=torch.float16) * 0.1).double().requires_grad_()
    targets, coefficients = torch.randint(0, vocabulary, (rows,)), torch.full((rows,), 1 / 20_000)

    def found(dtype, scale):
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (hidden, weight)]
        loss = linear_cross_entropy(*leaves, targets, row_weight=coefficients.to(dtype), reduction=reduction).sum()
        return [grad.double() / scale for grad in torch.autograd.grad(loss * scale, leaves)]

    for half, true in zip(found(torch.float16, 65536.0), found(torch.float64, 1.0), strict=True):
        assert (half - true).norm() < 2e-3 * true.norm()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_are_refused_not_zero(reduction):
    hidden, weight, targets, _ = operands()
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
        torch.autograd.grad(loss, hidden, create_graph=True)
    first = torch.autograd.grad(loss, hidden)[0]
    wanted = torch.autograd.grad(by_autograd(hidden, weight, targets, reduction).sum(), hidden)[0]
    torch.testing.assert_close(first, wanted)


@pytest.mark.parametrize("loss", [linear_cross_entropy, linear_cross_entropy_by_autograd])
def test_targets_of_minus_100_are_left_out_of_a_sum_unless_told_otherwise(loss):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(120, 8, generator=generator)
    targets = torch.tensor([100, -100, 101, 5, 99, -100])
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(loss(hidden, weight, targets), wanted)
