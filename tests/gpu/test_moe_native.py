"""The token-routed MLP on a CUDA device: its kernels against torch in float64, and properties of the device."""

import pytest
import torch

from cggr_kernels import moe_products as products
from cggr_kernels.moe_experts import moe_experts
from cggr_kernels.moe_plan import make_plan
from cggr_kernels.moe_route import moe_route
from cggr_moe import PersistentTRMLP
from cggr_moe.grouped import moe_experts_reference
from cggr_moe.routing import moe_route_reference
from tests.support.host_reads import no_host_reads
from tests.support.small_language_model import WIDTH, SmallLanguageModel, loss_curve

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def problem(T, H, I, E, K, dtype):
    x, gate_up, down = (torch.randn(size, device="cuda") * 0.4 for size in ((T, H), (E, 2 * I, H), (E, H, I)))
    index = torch.rand(T, E, device="cuda").argsort(1)[:, :K].contiguous()
    return x.to(dtype), gate_up.to(dtype) / H**0.5, down.to(dtype), index, torch.rand(T, K, device="cuda")


def run(function, x, gate_up, down, index, weight):
    leaves = [tensor.detach().requires_grad_() for tensor in (x, gate_up, down, weight)]
    out = function(*leaves[:3], index, leaves[3])
    generator = torch.Generator("cuda").manual_seed(2)
    upstream = torch.randn(out.shape, generator=generator, device="cuda").to(out)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def check_against_truth(*operands):
    values, rivals = run(moe_experts, *operands), run(moe_experts_reference, *operands)
    truths = run(moe_experts_reference, *(x.double() if x.is_floating_point() else x for x in operands))
    for place, (value, rival, truth) in enumerate(zip(values, rivals, truths, strict=True)):
        error, rival_error = (value.double() - truth).norm(), (rival.double() - truth).norm()
        # The gradient of a choice's weight is a scalar product with the expert's output, which may come to nothing.
        size = max(truth.norm(), truths[0].norm() / operands[4].norm()) if place == 4 else truth.norm()
        assert error <= rival_error + TOLERANCE[operands[0].dtype] * size, (place, error / size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("T", "H", "I", "E", "K"),
    [(1, 64, 64, 1, 1), (257, 72, 200, 7, 3), (1000, 256, 384, 8, 8), (3000, 512, 96, 100, 4)],
)
def test_experts(T, H, I, E, K, dtype):
    check_against_truth(*problem(T, H, I, E, K, dtype))


def test_blocks_for_little_shared_memory(monkeypatch):
    monkeypatch.setattr(products, "HALF_BLOCKS", products.SMALL_BLOCKS)
    check_against_truth(*problem(1000, 256, 200, 8, 3, torch.bfloat16))


@pytest.mark.parametrize("routing", ["one expert", "half empty", "null", "nothing"])
def test_loads_that_are_not_even(routing):
    x, gate_up, down, index, weight = problem(1500, 256, 128, 16, 2, torch.bfloat16)
    if routing == "one expert":
        index.fill_(11)
    elif routing == "half empty":
        index //= 2
    elif routing == "null":
        index[torch.rand(1500, device="cuda") < 0.7] = -1
    else:
        index.fill_(-1)
        assert all((value == 0).all() for value in run(moe_experts, x, gate_up, down, index, weight))
        return
    check_against_truth(x, gate_up, down, index, weight)


@pytest.mark.parametrize(("T", "E", "K"), [(1, 1, 1), (16385, 8, 2), (5000, 128, 8), (300, 512, 4)])
def test_route(T, E, K):
    logits = torch.randn(T, E, device="cuda")
    logits[:, E // 2 + 1 :: 7] = -torch.inf
    logits[T // 2, 0] = torch.nan if T > 1 else 0.0
    results = []
    for function in (moe_route, moe_route_reference):
        leaf = logits.clone().requires_grad_()
        out = function(leaf, None, None, K, True)
        loss = (out[0] * torch.arange(K, device="cuda")).sum() + 3 * out[2] + out[3]
        results.append((*(x.detach() for x in out), *torch.autograd.grad(loss, leaf)))
    for place, (value, expected) in enumerate(zip(*results, strict=True)):
        if place in (1, 4, 6):
            assert torch.equal(value, expected)
        else:
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def make_layer(dtype=torch.bfloat16, **options):
    torch.manual_seed(0)
    sizes = {"hidden_dim": 256, "intermediate_dim": 384, "num_experts": 16, "top_k": 4} | options
    return PersistentTRMLP(**sizes, dtype=dtype, device="cuda")


def step(layer, x, upstream, mask=None):
    out, aux_loss = layer(x, mask)
    return (
        out.detach(),
        aux_loss.detach(),
        *torch.autograd.grad((out, aux_loss), (x, *layer.parameters()), (upstream, aux_loss.new_ones(()))),
    )


def test_bitwise_the_same_from_run_to_run():
    layer = make_layer()
    x = torch.randn(4, 511, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    first = step(layer, x, upstream)
    for _ in range(4):
        for value, expected in zip(step(layer, x, upstream), first, strict=True):
            assert torch.equal(value, expected)


def test_the_host_waits_for_nothing():
    layer = make_layer(router_bias=True, z_loss=0.1)
    x = torch.randn(2, 300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream, mask = torch.randn_like(x), torch.rand(2, 300, device="cuda") > 0.5
    step(layer, x, upstream, mask)
    with no_host_reads():
        step(layer, x, upstream, mask)
        layer.update_router_bias()


def test_cuda_graph_follows_the_routing():
    layer = make_layer()
    x = torch.randn(700, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream, mask = torch.randn_like(x), torch.ones(700, dtype=torch.bool, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(layer, x, upstream, mask)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(layer, x, upstream, mask)
    for kept in (1.0, 0.3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            mask.copy_(torch.rand(700, device="cuda") < kept)
        graph.replay()
        for value, expected in zip(captured, step(layer, x, upstream, mask), strict=True):
            assert torch.equal(value, expected)


def test_compiles_as_one_graph():
    layer = make_layer()
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    upstream = torch.randn_like(x)
    out, aux_loss = compiled(x)
    gradient = torch.autograd.grad(out, x, upstream)[0]
    expected = step(layer, x, upstream)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(aux_loss, expected[1])
    torch.testing.assert_close(gradient, expected[2], rtol=0.05, atol=0.02)


def test_launches_do_not_depend_on_the_number_of_experts():
    from torch.profiler import DeviceType, ProfilerActivity, profile

    counts = set()
    for E in (4, 64):
        logits = torch.randn(512, E, device="cuda", requires_grad=True)
        x, gate_up, down, *_ = problem(512, 64, 64, E, 2, torch.bfloat16)
        leaves = [logits, *(tensor.requires_grad_() for tensor in (x, gate_up, down))]

        def both(leaves=leaves):
            weight, index, balance, *_ = moe_route(leaves[0], None, None, 2, True)
            out = moe_experts(*leaves[1:], index, weight)
            torch.autograd.grad((out, balance), leaves, (torch.ones_like(out), torch.ones_like(balance)))

        both()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            both()
            torch.cuda.synchronize()
        counts.add(sum(event.device_type == DeviceType.CUDA for event in profiler.events()))
    assert len(counts) == 1, counts
    assert counts.pop() <= 24


def test_masked_tokens_cost_no_tiles():
    index = torch.randint(0, 4, (4096, 1), device="cuda")
    index[512:] = -1
    assert int(make_plan(index, 4).tiles) <= 512 // 128 + 4


def test_bad_tokens_are_reported_by_the_next_call():
    layer = make_layer()
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    x[7, 3] = torch.nan
    out, aux_loss = layer(x)
    assert out.isfinite().all()
    assert aux_loss.isfinite()
    with pytest.raises(ValueError, match=r"the router logits of 1 token\(s\) have no softmax"):
        layer(torch.zeros_like(x))
    layer(torch.zeros_like(x))


def test_more_elements_than_int32_counts():
    H, I, E = 2048, 64, 2
    T = 2**31 // H + 1000
    x = torch.empty(T, H, device="cuda", dtype=torch.bfloat16).normal_()
    _, gate_up, down, _, _ = problem(1, H, I, E, 1, torch.bfloat16)
    index = (torch.arange(T, device="cuda") % E)[:, None].contiguous()
    weight = torch.ones(T, 1, device="cuda")
    rows = torch.tensor([0, 1, T // 2, T - 2, T - 1], device="cuda")
    leaf = x.requires_grad_()
    out = moe_experts(leaf, gate_up, down, index, weight)
    upstream = torch.zeros_like(out)
    upstream[rows] = 1
    gradient = torch.autograd.grad(out, leaf, upstream)[0]
    few = x.detach()[rows].requires_grad_()
    expected = moe_experts(few, gate_up, down, index[rows], weight[rows])
    assert torch.equal(out[rows], expected)
    assert torch.equal(gradient[rows], torch.autograd.grad(expected, few, torch.ones_like(expected))[0])
    assert gradient.count_nonzero() <= rows.numel() * H


def test_loss_curve_of_a_small_language_model():
    torch.manual_seed(0)
    layers = [PersistentTRMLP(WIDTH, 32, num_experts=4, top_k=2) for _ in range(2)]
    model = SmallLanguageModel(layers)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = loss_curve(model, 200)  # in torch on the CPU
    for dtype, tolerance in ((torch.float32, 0.02), (torch.bfloat16, 0.03)):
        model.load_state_dict(state)
        curve = loss_curve(model.to("cuda", dtype), 200, "cuda")
        assert expected[-20:].mean() < 0.6 * expected[:5].mean()
        # Ten steps at a time: a choice of experts may hang on rounding.
        difference = (curve - expected).view(20, 10).mean(1).abs()
        assert difference.max() < tolerance, (dtype, difference)
        model = model.to("cpu", torch.float32)
