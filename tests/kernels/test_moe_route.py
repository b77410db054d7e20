import pytest
import torch

from cggr_kernels.moe_route import MAX_EXPERTS, moe_route
from cggr_moe.routing import moe_route_reference

# weight, balance loss, z-loss, entropy; index, counts and bad tokens are compared exactly
VALUES, COUNTS = (0, 2, 3, 5), (1, 4, 6)


def outputs_and_gradient(function, logits, *rest):
    leaf = logits.detach().requires_grad_()
    out = function(leaf, *rest)
    upstream = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(1)).to(out[0])
    loss = (out[0] * upstream).sum() + 1.7 * out[2] + 0.3 * out[3]
    return [x.detach() for x in out], torch.autograd.grad(loss, leaf)[0]


def check(logits, bias, keep, top_k, norm):
    found, gradient = outputs_and_gradient(moe_route, logits, bias, keep, top_k, norm)
    expected, gradient_expected = outputs_and_gradient(moe_route_reference, logits, bias, keep, top_k, norm)
    for place in COUNTS:
        assert torch.equal(found[place], expected[place]), place
    for place in VALUES:
        torch.testing.assert_close(found[place], expected[place], rtol=2e-5, atol=1e-6)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3}[logits.dtype]
    torch.testing.assert_close(gradient, gradient_expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "E", "K"), [(1, 1, 1), (7, 4, 2), (257, 8, 3), (5, 3, 3), (9, 100, 8)])
def test_outputs_and_gradient(T, E, K, dtype, device):
    torch.manual_seed(T)
    # Distinct in float16 as well, so that no choice hangs on rounding.
    logits = torch.stack([torch.randperm(E) for _ in range(T)]).to(device, dtype) / 4
    for norm in (True, False):
        check(logits, None, None, K, norm)


def test_bias_mask_infinities_and_tokens_without_a_softmax(device):
    torch.manual_seed(0)
    logits = torch.randn(40, 6, device=device)
    logits[::3, 1:3] = -torch.inf
    logits[4], logits[5, 2], logits[6, 0] = -torch.inf, torch.nan, torch.inf
    logits[7, 1:] = -torch.inf
    bias, keep = torch.randn(6, device=device), torch.rand(40, device=device) > 0.3
    keep[4:8] = True
    for norm in (True, False):
        check(logits, bias, keep, 4, norm)
    assert moe_route(logits, None, None, 2, True)[6] == 3


def test_equal_scores_go_to_the_lower_experts(device):
    assert moe_route(torch.zeros(3, 6, device=device), None, None, 3, True)[1].tolist() == [[0, 1, 2]] * 3


def test_nothing_to_route(device):
    for logits, keep in (
        (torch.randn(3, 4, device=device), torch.zeros(3, dtype=torch.bool, device=device)),
        (torch.randn(0, 4, device=device), None),
    ):
        found, gradient = outputs_and_gradient(moe_route, logits, None, keep, 2, True)
        assert found[2] == found[3] == found[5] == 0
        assert (found[1] == -1).all()
        assert (gradient == 0).all()


def test_bad_input_is_named(device):
    logits = torch.randn(3, 4, device=device)
    with pytest.raises(ValueError, match="top_k must be 1 to 4"):
        moe_route(logits, None, None, 5, True)
    with pytest.raises(ValueError, match=f"the kernels take 1 to {MAX_EXPERTS}"):
        moe_route(torch.zeros(1, MAX_EXPERTS + 1, device=device), None, None, 1, True)
    with pytest.raises(TypeError, match="logits must be float32"):
        moe_route(logits.long(), None, None, 1, True)
    with pytest.raises(ValueError, match="bias must be float32"):
        moe_route(logits, torch.zeros(3, device=device), None, 1, True)
    with pytest.raises(ValueError, match="keep must be bool"):
        moe_route(logits, None, torch.zeros(3, device=device), 1, True)
    with pytest.raises(ValueError, match="logits is on meta"):
        moe_route(logits.to("meta"), None, None, 1, True)


def test_op_registration(device):
    logits = torch.randn(7, 4, device=device)
    ops = torch.ops.cggr_kernels
    torch.library.opcheck(ops.moe_route.default, (logits, None, None, 2, True))
    weight, index, *_, lse, slope = ops.moe_route(logits, None, None, 2, True)
    scalar = torch.ones((), device=device)
    arguments = (logits, lse, index, slope, torch.ones_like(weight), scalar, scalar, True)
    torch.library.opcheck(ops.moe_route_gradient.default, arguments)


def test_compiles_as_one_graph(device, compiler):
    logits = torch.randn(7, 4, device=device)
    compiled = torch.compile(moe_route, fullgraph=True, backend=compiler)
    found, gradient = outputs_and_gradient(compiled, logits, None, None, 2, True)
    expected, gradient_expected = outputs_and_gradient(moe_route, logits, None, None, 2, True)
    for value, truth in zip((*found, gradient), (*expected, gradient_expected), strict=True):
        torch.testing.assert_close(value, truth)
