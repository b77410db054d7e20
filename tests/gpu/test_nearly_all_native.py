"""Attention of nearly all queries of long rows, by cuDNN on Hopper GPUs, held to float64."""

import pytest
import torch

from cggr_core.routed_attention import routed_attention_reference
from cggr_core.routing import nearly_all
from cggr_kernels.routed_attention import routed_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_equals_the_kernel_for_any_queries(size, dtype):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuDNN's attention is used on Hopper GPUs alone")
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "dtype": dtype, "generator": generator}
    length, queries = nearly_all.LEAST_KEYS, 3700
    # Heads beside each other, as projections make them.
    q = torch.randn(1, queries, 4, size, **options)
    k, v = (torch.randn(1, length, 2, size, **options) for _ in range(2))
    order = torch.rand(1, length, device="cuda", generator=generator)
    position = order.argsort(1)[:, :queries].sort(1).values
    heads_first = [part.transpose(1, 2) for part in (q, k, v)]
    assert nearly_all.pays(heads_first[0], length)
    found = nearly_all.attend(*heads_first, position, 0.2)
    rival = routed_attention(q, k, v, position, scale=0.2)
    truth = routed_attention_reference(*(part.double() for part in (q, k, v)), position, scale=0.2)
    allowed = 1.5 * (rival.double() - truth).abs().max() + 1e-4
    assert (found.double() - truth).abs().max() <= allowed


def test_pays_neither_with_gradients_nor_for_few_queries_or_short_rows():
    q = torch.empty(1, 2, nearly_all.LEAST_KEYS, 64, device="cuda", dtype=torch.bfloat16)
    assert not nearly_all.pays(q, nearly_all.LEAST_KEYS)
    with torch.no_grad():
        assert not nearly_all.pays(q[:, :, :1000], nearly_all.LEAST_KEYS)
        assert not nearly_all.pays(q[:, :, :1000], 1000)
        assert not nearly_all.pays(q.float(), nearly_all.LEAST_KEYS)
