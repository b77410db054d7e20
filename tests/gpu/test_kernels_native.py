"""What the interpreter cannot show: bfloat16 products, all configurations, no host reads, graphs, memory."""

import pytest
import torch

import cggr_kernels._routed_attention_launch as attention
from cggr_core.difficulty import difficulty_reference, linear_difficulty_reference
from cggr_core.linear_loss import linear_cross_entropy_by_autograd
from cggr_core.routed_attention import routed_attention_reference
from cggr_core.sampling import select_reference
from cggr_kernels.difficulty import difficulty
from cggr_kernels.linear_cross_entropy import linear_cross_entropy
from cggr_kernels.linear_difficulty import linear_difficulty
from cggr_kernels.routed_attention import routed_attention
from cggr_kernels.select import STRATEGIES, select
from tests.support.host_reads import no_host_reads


def attention_problem(B, K, S, H, HKV, D, dtype=torch.bfloat16):
    torch.manual_seed(0)
    q, k, v, d_out = (
        torch.randn(B, length, heads, D, device="cuda", dtype=dtype)
        for length, heads in ((K, H), (S, HKV), (S, HKV), (K, H))
    )
    position = torch.rand(B, S, device="cuda").argsort(1)[:, :K].sort(1).values
    segment = (torch.rand(B, S, device="cuda") < 0.01).cumsum(1)
    return q, k, v, position, segment, d_out


def gradients(function, q, k, v, d_out, *rest, **named):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, *rest, **named)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


def check_attention(q, k, v, position, segment, d_out, *numbers):
    values = gradients(routed_attention, q, k, v, d_out, position, segment, *numbers)
    rivals = gradients(routed_attention_reference, q, k, v, d_out, position, segment, *numbers)
    doubles = (x.double() for x in (q, k, v, d_out))
    truths = gradients(routed_attention_reference, *doubles, position, segment, *numbers)
    for value, rival, truth in zip(values, rivals, truths, strict=True):
        error, rival_error = (value.double() - truth).norm(), (rival.double() - truth).norm()
        assert error <= rival_error + 5e-3 * truth.norm()


@pytest.mark.parametrize("D", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_head_dimensions_and_dtypes(D, dtype, masked):
    q, k, v, position, segment, d_out = attention_problem(2, 150, 517, 8, 2, D, dtype)
    check_attention(q, k, v, position, segment if masked else None, d_out, *((100, 20.0) if masked else ()))


@pytest.mark.parametrize(("H", "HKV", "D"), [(6, 2, 128), (7, 1, 64), (4, 4, 80), (4, 1, 20)])
def test_numbers_of_heads_and_rows_that_are_copied(H, HKV, D):
    check_attention(*attention_problem(2, 150, 517, H, HKV, D))


def test_blocks_for_little_shared_memory(monkeypatch):
    monkeypatch.setattr(attention, "shared_memory", lambda device: 0)
    for D in (64, 128, 256):
        check_attention(*attention_problem(1, 70, 300, 4, 2, D), 50)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("window", [None, 300])
def test_attention_in_long_documents_with_padding_on_either_side(D, window):
    """Most blocks of keys are seen by all queries of a block, which are then not asked about each."""
    q, k, v, position, segment, d_out = attention_problem(4, 512, 2000, 8, 2, D)
    segment.zero_()
    segment[0, 1170:] = -1
    segment[1, :930] = -1
    segment[2, 700:1500] = 5
    check_attention(q, k, v, position, segment, d_out, window)


def test_attention_repeats_bit_for_bit():
    q, k, v, position, segment, d_out = attention_problem(2, 256, 1024, 8, 2, 64)
    first, second = (gradients(routed_attention, q, k, v, d_out, position, segment) for _ in range(2))
    for value, same in zip(first, second, strict=True):
        assert torch.equal(value, same)


@pytest.mark.parametrize("V", [50257, 128256, 262144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_difficulty_of_real_vocabularies(V, dtype):
    torch.manual_seed(0)
    logits = (torch.randn(65, V, device="cuda") * 3).to(dtype)
    targets = torch.randint(0, V, (65,), device="cuda")
    targets[::5] = -100
    truth = difficulty_reference(logits.double(), targets)
    rival = difficulty_reference(logits, targets)
    for value, other, expected in zip(difficulty(logits, targets), rival, truth, strict=True):
        error, rival_error = (value.double() - expected).abs(), (other.double() - expected).abs()
        assert (error <= rival_error + 2e-5 * (1 + expected.abs())).all()


def test_rows_beyond_two_to_the_31_elements():
    logits = torch.zeros(2**31 // 32768 + 2, 32768, device="cuda", dtype=torch.bfloat16)
    logits[-1, 5] = 7
    values = difficulty(logits)
    expected = difficulty_reference(logits[-1:].float())
    for value, last in zip(values, expected, strict=True):
        torch.testing.assert_close(value[-1:], last)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_linear_ops_in_bfloat16(softcap):
    torch.manual_seed(0)
    hidden = torch.randn(600, 256, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(32000, 256, device="cuda") * 0.1).bfloat16()
    targets = torch.randint(0, 32000, (600,), device="cuda")
    targets[::7] = -100
    arguments = (hidden, weight, targets, None, softcap)
    rivals = linear_difficulty_reference(*arguments)
    truths = linear_difficulty_reference(hidden.double(), weight.double(), targets, None, softcap)
    for value, rival, truth in zip(linear_difficulty(*arguments), rivals, truths, strict=True):
        assert (value - truth).norm() <= 1.2 * (rival - truth).norm() + 1e-5 * truth.norm()

    row_index = torch.arange(0, 600, 2, device="cuda")
    row_weight = torch.rand(300, device="cuda")

    def run(function, hidden, weight):
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = function(*leaves, targets, row_index, row_weight, None, softcap)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    values, rivals = run(linear_cross_entropy, hidden, weight), run(linear_cross_entropy_by_autograd, hidden, weight)
    truths = run(linear_cross_entropy_by_autograd, hidden.double(), weight.double())
    for value, rival, truth in zip(values, rivals, truths, strict=True):
        error, rival_error = (value.double() - truth).norm(), (rival.double() - truth).norm()
        assert error <= rival_error + 5e-3 * truth.norm()


def test_many_rows_of_the_largest_vocabulary():
    """16,384 rows of 262,144 classes: every statistic and every loss, against the reference on some of the rows."""
    torch.manual_seed(0)
    hidden = torch.randn(16384, 64, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(262144, 64, device="cuda") * 0.3).bfloat16()
    targets = torch.randint(0, 262144, (16384,), device="cuda")
    some = torch.arange(5, 16384, 1111, device="cuda")
    values = linear_difficulty(hidden, weight, targets)
    truths = linear_difficulty_reference(hidden[some].float(), weight.float(), targets[some])
    for value, truth in zip(values, truths, strict=True):
        assert torch.isfinite(value).all()
        torch.testing.assert_close(value[some], truth, rtol=0.02, atol=0.02)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    losses = linear_cross_entropy(*leaves, targets, reduction="none")
    torch.testing.assert_close(losses[some], truths[3], rtol=0.02, atol=0.02)
    loss = linear_cross_entropy(*leaves, targets)
    torch.testing.assert_close(loss.detach(), losses.detach().sum(), rtol=1e-4, atol=0)
    for gradient, same in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(losses.sum(), leaves), strict=True
    ):
        assert (gradient - same).norm() <= 0.01 * same.norm()


def test_values_from_outside_assert_nothing_on_the_device():
    """Rows and classes that do not exist make NaN; a failed assertion there would end the process's use of the GPU."""
    hidden = torch.randn(8, 16, device="cuda", requires_grad=True)
    weight = torch.randn(1000, 16, device="cuda")
    outside = torch.tensor([0, 8, -1, 2**40], device="cuda")
    targets = torch.tensor([1, 1000, -3, 2**40, 0, 5, -100, 9], device="cuda")
    losses = linear_cross_entropy(hidden, weight, targets, outside, reduction="none")
    assert losses.isnan().tolist() == [False, True, True, True]
    linear_cross_entropy(hidden, weight, targets).backward()
    assert difficulty(hidden.detach(), targets)[3].isnan().tolist() == [
        False,
        True,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    torch.cuda.synchronize()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("B", "S"), [(1, 2**18), (16, 4096)])
def test_selections_of_many_scores(strategy, B, S):
    torch.manual_seed(0)
    score = torch.rand(B, S, device="cuda") ** 2
    countable = torch.rand(B, S, device="cuda") < 0.9
    rest = (0.25, strategy, S // 4, 4, 1, True, 3, 5, 0.05, 70_000)
    index, valid, weight = select(score, countable, *rest)
    expected = select_reference(score, countable, *rest)
    assert torch.equal(index, expected[0])
    assert torch.equal(valid, expected[1])
    torch.testing.assert_close(weight, expected[2], rtol=1e-6, atol=0)
    for value, on_cpu in zip((index, valid), select_reference(score.cpu(), countable.cpu(), *rest), strict=False):
        assert (value.cpu() == on_cpu).float().mean() > 0.999


def every_op():
    """One call of every op, forward and backward, that returns what it computed."""
    q, k, v, position, segment, d_out = attention_problem(2, 128, 512, 8, 2, 64)
    hidden = torch.randn(256, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(5000, 128, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 5000, (256,), device="cuda")
    row_index = torch.arange(0, 256, 4, device="cuda")
    logits = hidden @ weight.t()
    score = torch.rand(2, 500, device="cuda")
    draw = torch.zeros((), dtype=torch.int64, device="cuda")

    def call():
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        loss = linear_cross_entropy(*leaves, targets, row_index)
        return [
            *difficulty(logits, targets),
            *linear_difficulty(hidden, weight, targets),
            *(value for strategy in STRATEGIES for value in select(score, score > 0.1, 0.25, strategy, 125, draw=draw)),
            loss.detach(),
            *torch.autograd.grad(loss, leaves),
            *gradients(routed_attention, q, k, v, d_out, position, segment, 200),
            *gradients(routed_attention, q, k, v, d_out, position, key_gradient="kept"),
        ]

    return call


def test_nothing_is_read_by_the_host():
    call = every_op()
    call()
    with no_host_reads():
        call()


def test_a_cuda_graph_gives_the_same_numbers():
    call = every_op()
    expected = call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = call()
    for value in values:
        value.fill_(float("nan") if value.is_floating_point() else 0)
    graph.replay()
    for value, same in zip(values, expected, strict=True):
        assert torch.equal(value, same)


def test_a_sum_of_a_quarter_of_the_rows_needs_hardly_more_memory_than_its_gradients():
    torch.manual_seed(0)
    hidden = torch.randn(16384, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(16384, 2048, device="cuda") * 0.02).bfloat16().requires_grad_()
    targets = torch.randint(0, 16384, (16384,), device="cuda")
    row_index = torch.arange(3, 16384, 4, device="cuda")

    def call(reduction="sum"):
        loss = linear_cross_entropy(hidden, weight, targets, row_index, reduction=reduction).sum()
        return torch.autograd.grad(loss, (hidden, weight))

    expected = call("none")
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    values = call()
    outputs = 2 * (hidden.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before <= outputs + 1.5 * 2**20
    for value, same in zip(values, expected, strict=True):
        assert (value - same).norm() <= 0.01 * same.norm()
    assert (values[0][0::4] == 0).all()


def test_memory_does_not_hold_the_logits():
    hidden = torch.randn(8192, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(65536, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 65536, (8192,), device="cuda")
    logits_bytes = 2 * 8192 * 65536
    for call in (
        lambda: linear_difficulty(hidden, weight, targets),
        lambda: linear_cross_entropy(hidden, weight, targets).backward(),
    ):
        call()
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        assert torch.cuda.max_memory_allocated() - before < logits_bytes / 3
