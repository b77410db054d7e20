"""Scores, selections and losses on an accelerator: equal to the CPU, without host reads, in one graph."""

import pytest
import torch

from cggr_core.linear_loss import linear_cross_entropy
from cggr_core.loss import CGGRLinearLoss, CGGRLoss
from cggr_core.monitor import Monitor
from cggr_core.randomness import uniform
from cggr_core.settings import SCOPES, SELECTIONS
from cggr_core.statistics import linear_token_statistics, token_statistics
from cggr_core.strategies import select
from tests.support import host_reads

pytestmark = pytest.mark.gpu
B, S, H, V = 4, 65, 32, 1031


@pytest.fixture
def no_host_reads():
    def run(function, *arguments, **more):
        with host_reads.no_host_reads():
            return function(*arguments, **more)

    return run


def data():
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, S, H), torch.randn(V, H)
    targets = torch.randint(0, V, (B, S))
    targets[1, 10:] = -100
    return hidden, weight, targets


def test_random_numbers_are_those_of_the_cpu():
    on_device = uniform((1000,), seed=5, draw=torch.tensor(7, device="cuda"), device="cuda")
    assert torch.equal(on_device.cpu(), uniform((1000,), seed=5, draw=7))


def test_statistics(no_host_reads):
    hidden, weight, targets = data()
    logits = hidden @ weight.T
    plain = no_host_reads(token_statistics, logits.cuda(), targets.cuda())
    linear = no_host_reads(linear_token_statistics, hidden.cuda(), weight.cuda(), targets.cuda(), softcap=9.0)
    for found, expected in (
        (plain, token_statistics(logits, targets)),
        (linear, token_statistics(9.0 * torch.tanh(logits / 9.0), targets)),
    ):
        for a, b in zip(found[:-1], expected[:-1], strict=True):
            torch.testing.assert_close(a.cpu(), b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("block_size", [1, 4])
def test_selections_are_those_of_the_cpu(selection, scope, block_size, no_host_reads):
    score = torch.rand(B, S, generator=torch.Generator().manual_seed(1))
    countable = data()[2] != -100
    settings = {"ratio": 0.3, "selection": selection, "scope": scope, "block_size": block_size}
    for draw in range(20):
        expected = select(score, countable, draw=draw, **settings)
        made = no_host_reads(select, score.cuda(), countable.cuda(), draw=draw, **settings)
        assert torch.equal(made.index.cpu(), expected.index)
        assert torch.equal(made.valid.cpu(), expected.valid)
        torch.testing.assert_close(made.weight.cpu(), expected.weight)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_linear_cross_entropy(reduction, no_host_reads):
    hidden, weight, targets = data()
    operands = [hidden.flatten(0, 1), weight]
    found = []
    for device in ("cpu", "cuda"):
        leaves = [operand.detach().to(device, copy=True).requires_grad_() for operand in operands]
        labels = targets.flatten().to(device)

        def step(leaves=leaves, labels=labels):
            loss = linear_cross_entropy(*leaves, labels, softcap=9.0, reduction=reduction).sum()
            loss.backward()
            return loss.detach()

        found.append([step() if device == "cpu" else no_host_reads(step), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b.cpu(), a, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_step_of_either_loss_reads_nothing(selection, no_host_reads):
    hidden, weight, targets = (tensor.cuda() for tensor in data())
    logits = (hidden @ weight.T).requires_grad_()
    hidden.requires_grad_(), weight.requires_grad_()

    def steps():
        for make, operands in ((CGGRLoss, (logits,)), (CGGRLinearLoss, (hidden, weight))):
            criterion = make(selection=selection)
            for _ in range(3):
                criterion(*operands, targets).backward()

    CGGRLoss(selection=selection)(logits, targets).backward()  # libraries load at the first call
    no_host_reads(steps)


def test_bad_values_are_raised_one_step_later():
    _, _, targets = (tensor.cuda() for tensor in data())
    logits = torch.randn(B, S, V, device="cuda", requires_grad=True)
    outside = targets.clone()
    outside[0, :3] = V + 5
    criterion = CGGRLoss()
    assert criterion(logits, outside).isfinite()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"in an earlier step, targets holds 3 value\(s\) outside the vocabulary"):
        criterion(logits, targets)
    nan = logits.detach().clone()
    nan[2, :2] = float("nan")
    criterion(nan, targets)
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"in an earlier step, logits were NaN at 2 countable position\(s\)"):
        criterion(logits, targets)
    criterion(logits, targets)


def test_monitor_arrives_without_blocking(no_host_reads):
    monitor = Monitor()
    no_host_reads(monitor.post, torch.tensor([1.0, 2.0], device="cuda"))
    assert monitor.read(wait=True) == [1.0, 2.0]
    for value in range(5):
        no_host_reads(monitor.post, torch.tensor([float(value)], device="cuda"))
        no_host_reads(monitor.read)
    torch.cuda.synchronize()
    monitor.post(torch.tensor([9.0], device="cuda"))
    torch.cuda.synchronize()
    assert monitor.read() == [9.0]


@pytest.mark.parametrize("selection", ["stratified", "sampled", "random", "topk"])
def test_a_step_is_one_graph_and_every_replay_selects_anew(selection):
    hidden, weight, targets = (tensor.cuda() for tensor in data())
    hidden.requires_grad_(), weight.requires_grad_()
    criterion = CGGRLinearLoss(selection=selection)
    draw = torch.zeros((), dtype=torch.int64, device="cuda")
    criterion(hidden, weight, targets)  # something is posted before the capture

    def step():
        hidden.grad = weight.grad = None
        criterion(hidden, weight, targets, draw=draw).backward()
        draw.add_(1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    draw.zero_()
    with torch.cuda.graph(graph):
        step()
    masks = []
    for replay in range(3):
        graph.replay()
        torch.cuda.synchronize()
        captured = hidden.grad.clone()
        masks.append(captured.abs().sum(2) > 0)
        leaf = hidden.detach().requires_grad_()
        criterion(leaf, weight.detach(), targets, draw=replay).backward()
        torch.testing.assert_close(captured, leaf.grad, atol=1e-5, rtol=1e-4)
    assert torch.equal(masks[0], masks[1]) == (selection == "topk")
