"""Routed log-probabilities on a GPU: equality, no host reads, and errors raised one call later."""

from contextlib import nullcontext

import pytest
import torch

from cggr_core import SharedContext, keep_random, keep_tokens, routed_logprobs
from tests.support.gpu_models import gradients, relative_error, tokens, varied
from tests.support.host_reads import no_host_reads

pytestmark = pytest.mark.gpu

MODES = ("exact", "kv", "detached")


def kept(input_ids):
    return keep_tokens(
        torch.rand(input_ids.shape, generator=torch.Generator().manual_seed(1)).to(input_ids.device) < 0.3
    )


def step(base, input_ids, keep, **settings):
    found = routed_logprobs(base, input_ids, keep=keep, entropy=True, **settings)
    loss = (found.weight * (found.logprob + 0.1 * found.entropy)).sum() / input_ids.numel()
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("mode", MODES)
def test_equals_the_cpu(mode):
    base, input_ids = varied(), tokens()
    loss = step(base, input_ids, kept(input_ids), gradient_mode=mode)
    found = {name: value.cpu() for name, value in gradients(base).items()}
    base.cpu()
    expected = step(base, input_ids.cpu(), kept(input_ids).cpu(), gradient_mode=mode)
    torch.testing.assert_close(loss.cpu(), expected, rtol=1e-4, atol=0)
    assert relative_error(found, gradients(base)) <= 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_a_selection_reads_nothing_from_the_device(mode):
    base, input_ids = varied(torch.bfloat16), tokens()
    mask = kept(input_ids)
    for number in range(3):
        with no_host_reads() if number == 2 else nullcontext():
            step(base, input_ids, keep_random(mask, 0.5, draw=number, capacity=128), gradient_mode=mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_shared_context_equals_the_repeated_form(mode):
    base, input_ids = varied(), tokens()
    before, rows = input_ids[:1, :150], input_ids[:, 150:]
    keep = kept(rows)
    loss = step(base, rows, keep, gradient_mode=mode, context=SharedContext(before))
    found = gradients(base)
    repeated = torch.cat([before.expand(3, -1), rows], dim=1)
    nothing = torch.zeros(3, 150, dtype=torch.bool, device=keep.device)
    expected = step(base, repeated, torch.cat([nothing, keep], dim=1), gradient_mode=mode)
    torch.testing.assert_close(loss * rows.numel(), expected * repeated.numel(), rtol=1e-4, atol=0)
    scale = repeated.numel() / rows.numel()
    assert relative_error(found, {name: scale * value for name, value in gradients(base).items()}) <= 1e-3


def test_what_the_device_finds_is_raised_by_the_next_call():
    base, input_ids = varied(), tokens()
    step(base, input_ids, kept(input_ids), targets=torch.full_like(input_ids, 1000))
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=r"targets of the last call had 771 value\(s\) outside \[0, 1000\)"):
        step(base, input_ids, kept(input_ids))
    with pytest.raises(ValueError, match=r"keep marks 3 position\(s\) that predict no token"):
        step(base, input_ids, torch.ones_like(input_ids, dtype=torch.bool))
