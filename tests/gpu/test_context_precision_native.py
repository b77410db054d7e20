"""FP8 products on the device: against their emulation, in a step, recorded as a graph, and without host reads."""

import pytest
import torch

import cggr_core.fp8 as fp8
from cggr_core import CGGRModel, linear_token_statistics
from cggr_core.backends import has_fp8_products
from tests.support.gpu_models import wide_model, wide_tokens
from tests.support.host_reads import no_host_reads
from tests.support.model_steps import ROUTED, backward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and has_fp8_products(torch.device("cuda"))),
        reason="row-scaled FP8 products need compute capability 9.0",
    ),
]


def model(dtype=torch.bfloat16):
    made = wide_model(dtype, layers=3)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.06)
    return made


def routed(made, gradient, engine, **settings):
    # Not by scores: an error in those would choose other tokens.
    return CGGRModel(made, gradient=gradient, engine=engine, selection="random", **settings)


def cosine(value, expected):
    flat, other = (torch.cat([part.flatten().float() for part in grads.values()]) for grads in (value, expected))
    return float(torch.nn.functional.cosine_similarity(flat, other, dim=0))


@pytest.mark.parametrize(("N", "K", "M"), [(1, 16, 16), (7, 256, 48), (255, 688, 256), (257, 2048, 512)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_the_emulation(N, K, M, biased, monkeypatch):
    torch.manual_seed(0)
    x, weight = (torch.randn(rows, K, device="cuda", dtype=torch.bfloat16) for rows in (N, M))
    bias = torch.randn(M, device="cuda", dtype=torch.bfloat16) if biased else None
    factors = (*fp8.quantize_rows(x), *fp8.quantize_rows(weight))
    found = fp8.product(*factors, bias)
    monkeypatch.setattr(fp8, "has_fp8_products", lambda device: False)
    emulated = fp8.product(*factors, bias)
    assert found.dtype == emulated.dtype == torch.bfloat16
    # Sums in 22 bits and one rounding to bfloat16 apart.
    error = (found.float() - emulated.float()).norm() / emulated.float().norm()
    assert error < 5e-3


@pytest.mark.parametrize(("N", "H", "V"), [(1, 16, 16), (7, 64, 272), (300, 512, 5008)])
def test_statistics_are_those_of_the_emulation(N, H, V, monkeypatch):
    monkeypatch.setattr("cggr_core.difficulty._FP8_CHUNK", 100 * V)  # several chunks, the last one not full
    torch.manual_seed(0)
    hidden, weight = (torch.randn(rows, H, device="cuda", dtype=torch.bfloat16) for rows in (N, V))
    weight, targets = 2 * weight / H**0.5, torch.randint(0, V, (N,), device="cuda")
    targets[1::3] = -100
    with no_host_reads():
        found = linear_token_statistics(hidden, weight, targets, precision="fp8")
    monkeypatch.setattr(fp8, "has_fp8_products", lambda device: False)
    emulated = linear_token_statistics(hidden, weight, targets, precision="fp8")
    for low, wanted in zip(found[:5], emulated[:5], strict=True):
        torch.testing.assert_close(low, wanted, rtol=0.02, atol=0.02)


def test_what_is_no_number_stays_none():
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    weight = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16)
    found = fp8.product(*fp8.quantize_rows(x), *fp8.quantize_rows(weight))
    assert found.isfinite().all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize(("gradient", "engine"), ROUTED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kept_tokens_are_moved_a_little(gradient, engine, dtype):
    made, input_ids = model(dtype), wide_tokens()
    own, own_gradients = backward(routed(made, gradient, engine), input_ids, draw=0)
    low, low_gradients = backward(routed(made, gradient, engine, context_precision="fp8"), input_ids, draw=0)
    assert low != own
    torch.testing.assert_close(low, own, rtol=0.02, atol=0)
    assert cosine(low_gradients, own_gradients) > 0.99


@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
def test_a_step_is_the_emulated_one(engine, monkeypatch):
    made, input_ids = model(), wide_tokens()
    found = backward(routed(made, "kv", engine, context_precision="fp8"), input_ids, draw=0)
    for module in ("cggr_core.fp8", "cggr_core.routing.precision"):
        monkeypatch.setattr(f"{module}.has_fp8_products", lambda device: False)
    with pytest.warns(UserWarning, match="emulated on cuda"):
        emulated = backward(routed(made, "kv", engine, context_precision="fp8"), input_ids, draw=0)
    torch.testing.assert_close(found[0], emulated[0], rtol=2e-3, atol=0)
    assert cosine(found[1], emulated[1]) > 0.999


def test_a_step_waits_for_nothing_and_can_be_recorded():
    made, input_ids = model(), wide_tokens()
    # Captured by hand here, so not by itself in the warm-up.
    wrapped = routed(made, "kv", "interleaved", context_precision="fp8", cuda_graph=False)

    def step():
        wrapped(input_ids, labels=input_ids, draw=0).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
            made.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(stream)
    with no_host_reads():
        step()
    made.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    recorded = {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.25)
    for gradient in recorded.values():
        gradient.zero_()
    graph.replay()
    replayed = {name: gradient.clone() for name, gradient in recorded.items()}
    made.zero_grad(set_to_none=True)
    step()
    eager = {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert cosine(replayed, eager) > 0.9999, "a replay quantises the weights as they are then"
