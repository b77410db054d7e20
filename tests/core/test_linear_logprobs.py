import pytest
import torch

from cggr_core import head_chunks
from cggr_core.logprobs.linear import linear_logprobs, linear_logprobs_by_autograd, logits_logprobs
from tests.support.allocations import largest_allocation
from tests.support.linear_heads import KINDS, operands


@pytest.fixture(autouse=True)
def _many_chunks(monkeypatch):
    monkeypatch.setattr(head_chunks, "_CPU_CHUNK", 100)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_autograd(kind, entropy):
    hidden, weight, targets, head = operands(kind=kind)
    leaves = [leaf for leaf in (hidden, weight, head.get("bias")) if leaf is not None]
    found = linear_logprobs(hidden, weight, targets, entropy=entropy, **head)
    expected = linear_logprobs_by_autograd(hidden, weight, targets, **head)
    upstream = torch.randn(2, 7, dtype=torch.float64)
    for used in ((0,), (1,), (0, 1)) if entropy else ((0,),):
        torch.testing.assert_close([found[i] for i in used], [expected[i] for i in used])
        grads, wanted = (
            torch.autograd.grad([pair[i] for i in used], leaves, [upstream[i] for i in used], retain_graph=True)
            for pair in (found, expected)
        )
        torch.testing.assert_close(grads, wanted)
    assert found[1] is not None if entropy else found[1] is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind):
    hidden, weight, targets, head = operands(N=4, H=3, V=9, kind=kind)
    bias = head.pop("bias", None)
    for function in (
        lambda h, w, b: linear_logprobs(h, w, targets, entropy=True, bias=b, **head),
        lambda h, w, b: linear_logprobs(h, w, targets, bias=b, **head)[0],
        lambda h, w, b: linear_logprobs_by_autograd(h, w, targets, bias=b, **head),
    ):
        assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_rows_without_a_target_are_nothing_whatever_they_hold():
    hidden, weight, targets, _ = operands()
    with torch.no_grad():
        hidden[2] = torch.nan
    logprob, entropy = linear_logprobs(hidden, weight, targets, entropy=True)
    (logprob + entropy).sum().backward()
    assert logprob[2] == 0 and entropy[2] == 0
    assert hidden.grad[2].abs().sum() == 0
    assert weight.grad.isfinite().all() and weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_torch(dtype):
    exact = operands(N=33, H=16, V=97)
    truth = linear_logprobs_by_autograd(*exact[:3])
    half = [part.detach().to(dtype).requires_grad_() for part in exact[:2]]
    found = linear_logprobs(*half, exact[2], entropy=True)
    plain = linear_logprobs_by_autograd(*half, exact[2])
    for value, same_dtype, wanted in zip(found, plain, truth, strict=True):
        assert value.dtype == torch.float32
        assert (value - wanted).abs().max() <= (same_dtype - wanted).abs().max() + 1e-4


def test_autocast_keeps_the_gradient_of_a_float32_weight_in_float32():
    hidden, weight, targets, _ = operands(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logprob, entropy = linear_logprobs(hidden, weight, targets, entropy=True)
    assert logprob.dtype == entropy.dtype == torch.float32
    (logprob + entropy).sum().backward()
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32


def test_certain_predictions():
    hidden = torch.tensor([[1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    for function in (linear_logprobs_by_autograd, lambda *a: linear_logprobs(*a, entropy=True)):
        logprob, entropy = function(hidden, weight, torch.tensor([0]))
        assert logprob == 0 and entropy == 0
        grads = torch.autograd.grad(logprob + entropy, (hidden, weight))
        assert all(grad.isfinite().all() for grad in grads)


def test_a_single_class_and_no_rows():
    logprob, entropy = linear_logprobs(torch.randn(3, 4), torch.randn(1, 4), torch.zeros(3).long(), entropy=True)
    assert logprob.abs().max() == 0 and entropy.abs().max() == 0
    empty, _ = linear_logprobs(torch.randn(0, 4), torch.randn(5, 4), torch.zeros(0).long(), entropy=True)
    assert empty.shape == (0,)


@pytest.mark.parametrize("entropy", [False, True])
def test_memory_is_a_chunk_and_the_gradients(entropy, monkeypatch):
    monkeypatch.setattr(head_chunks, "_CPU_CHUNK", 1000)
    hidden, weight, targets, _ = operands(1024, 4, 250, dtype=torch.float32)

    def step():
        sum(
            part.sum() for part in linear_logprobs(hidden, weight, targets, entropy=entropy) if part is not None
        ).backward()

    assert largest_allocation(step) <= 1024 * 4  # [N, V] would be 62 times as much


def test_of_logits():
    logits = torch.randn(5, 11, dtype=torch.float64)
    targets = torch.tensor([0, 10, -100, 3, 4])
    logprob, entropy = logits_logprobs(logits, targets)
    wanted = torch.distributions.Categorical(logits=logits)
    live = targets >= 0
    torch.testing.assert_close(logprob[live], wanted.log_prob(targets.clamp(min=0))[live])
    torch.testing.assert_close(entropy[live], wanted.entropy()[live])
    assert logprob[2] == 0 and entropy[2] == 0


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="hidden must be \\[N, H\\]"):
        linear_logprobs(torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3).long(), entropy=True)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        linear_logprobs(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 5]), entropy=True)
