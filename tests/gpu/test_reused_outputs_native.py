"""Steps that reuse the context pass's outputs, and kernels that leave queries without a gradient, on the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from cggr_core import CGGRModel, create_truncated_router
from tests.support.gpu_models import wide_model, wide_tokens
from tests.support.host_reads import no_host_reads
from tests.support.model_steps import backward
from tests.support.reference_routing import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("gradient", ["kv", "detached"])
def test_the_same_numbers_from_fewer_products(gradient, truncated):
    made, input_ids = wide_model(torch.float32, layers=4), wide_tokens()
    router = create_truncated_router(made, 2) if truncated else None
    found, flops = [], []
    for reuse in (False, True):
        wrapped = CGGRModel(made, router, gradient=gradient, reuse_outputs=reuse, cuda_graph=False)
        backward(wrapped, input_ids, draw=0)
        with FlopCounterMode(display=False) as counter:
            found.append(backward(wrapped, input_ids, draw=0))
        flops.append(counter.get_total_flops())
        loss = wrapped(input_ids, labels=input_ids, draw=0)
        with no_host_reads():
            loss.backward()
        made.zero_grad(set_to_none=True)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=0)
    assert relative_error(found[1][1], found[0][1]) < 1e-4
    assert flops[1] < flops[0]


def test_recorded_steps_reuse_too():
    made, input_ids = wide_model(torch.bfloat16, layers=4), wide_tokens()
    eager = backward(CGGRModel(made, reuse_outputs=True, cuda_graph=False), input_ids, draw=0)
    wrapped = CGGRModel(made, reuse_outputs=True)
    for _ in range(8):
        recorded = backward(wrapped, input_ids, draw=0)
    torch.testing.assert_close(recorded[0], eager[0], rtol=1e-3, atol=0)
    assert relative_error(recorded[1], eager[1]) < 0.02


class Products(TorchDispatchMode):
    """Sizes of the matrix products in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.sizes.append((*args[0].shape, args[1].shape[1]))
        return func(*args, **(kwargs or {}))


def test_other_tokens_queries_have_no_gradient():
    """It would be zeros, which the rest of the backward pass would multiply."""
    made, input_ids = wide_model(torch.float32, layers=4), wide_tokens()
    wrapped = CGGRModel(made, selection="random", min_tokens_ratio=0.25, cuda_graph=False)
    backward(wrapped, input_ids, draw=0)
    loss = wrapped(input_ids, labels=input_ids, draw=0)
    with Products() as products:
        loss.backward()
    tokens_of = {size[1] for size in products.sizes if size[0] == size[2] == 256}
    others = {size[1] for size in products.sizes if size[0] == 128 and size[2] == 256}
    kept = min(others)
    assert len(others) == 2, "keys and values of kept and of other tokens"
    assert kept in tokens_of
    assert max(others) not in tokens_of
