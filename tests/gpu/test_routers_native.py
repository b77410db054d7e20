"""Learned routers and remembered scores on a GPU: equality with the CPU, no host reads, one CUDA graph."""

import pytest
import torch

from cggr_core import CGGRModel
from cggr_core.experimental import LearnedRouter, RememberedScores
from tests.support.gpu_models import gradients, relative_error, tokens, varied
from tests.support.host_reads import no_host_reads
from tests.support.launchers import finish, launched

pytestmark = pytest.mark.gpu


def learned(base, gradient: str = "kv") -> CGGRModel:
    return CGGRModel(base, LearnedRouter(1, width=16, observed_tokens=96), gradient=gradient, selection="sampled")


@pytest.mark.parametrize("gradient", ["kv", "detached", "exact"])
def test_a_learned_router_equals_the_cpus(gradient):
    """The first selections: later ones follow predictions that differ by rounding."""
    base, input_ids = varied(), tokens()
    wrapped = learned(base, gradient)
    loss = wrapped(input_ids, labels=input_ids)
    loss.backward()
    found = {name: value.cpu() for name, value in gradients(base).items()}
    weights = [value.cpu() for value in wrapped.router.parameters()]
    base.cpu()
    on_cpu = learned(base, gradient)
    expected = on_cpu(input_ids.cpu(), labels=input_ids.cpu())
    expected.backward()
    torch.testing.assert_close(loss.detach().cpu(), expected.detach(), rtol=1e-4, atol=0)
    assert relative_error(found, gradients(base)) <= 1e-3
    for value, wanted in zip(weights, on_cpu.router.parameters(), strict=True):
        assert (value - wanted).abs().max() <= 1e-3  # four steps of Adam move by up to 1.2e-2


@pytest.mark.parametrize("router", ["learned", "remembered"])
def test_no_host_reads_in_the_step(router):
    base, input_ids = varied(torch.bfloat16), tokens()
    memory = RememberedScores.empty(examples=10, length=300)
    wrapped = learned(base) if router == "learned" else CGGRModel(base, memory)
    extra = {} if router == "learned" else {"example_ids": torch.tensor([3, 0, 7])}
    for _ in range(3):
        wrapped(input_ids, labels=input_ids, **extra).backward()
    with no_host_reads():
        loss = wrapped(input_ids, labels=input_ids, **extra)
        loss.backward()
        wrapped.step()
    assert torch.isfinite(loss)
    if router == "learned":
        assert wrapped.metrics["router_correlation"] != 0
    else:
        assert wrapped.metrics["engine"] == "interleaved"
        assert wrapped.metrics["remembered"] > 0.4
        assert (memory.observed[[3, 0, 7], :256] >= 0).float().mean() > wrapped.metrics["remembered"].item()


def test_the_step_of_a_learned_router_is_one_cuda_graph():
    base, input_ids = varied(), tokens()
    wrapped = learned(base)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            wrapped(input_ids, labels=input_ids).backward()
            base.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(stream)
    before = wrapped.routing_state_dict()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = wrapped(input_ids, labels=input_ids)
        loss.backward()
    losses = []
    for _ in range(2):
        graph.replay()
        losses.append(loss.detach().clone())
    again = learned(base)
    again.load_routing_state_dict(before)
    for replayed in losses:
        torch.testing.assert_close(again(input_ids, labels=input_ids).detach(), replayed, rtol=1e-4, atol=0)
    assert wrapped.router.updates == again.router.updates == 5
    torch.testing.assert_close(wrapped.router.head.out.weight, again.router.head.out.weight, rtol=0, atol=1e-3)


@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"two ranks take a GPU each; {torch.cuda.device_count()} here"
)
def test_two_gpus_remember_what_both_observed():
    print(finish(launched("torchrun", 2, "-m", "tests.support.router_ranks")).stdout)
