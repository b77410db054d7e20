"""What is done around the head counts in the loss, or its own logits are read, with one warning."""

import warnings

import pytest
import torch

from cggr_core import CGGRModel
from tests.support.reference_routing import gradients, relative_error
from tests.support.tiny_models import ROUTABLE, VOCAB


def tokens() -> torch.Tensor:
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def scaled(head):
    head.register_forward_hook(lambda module, args, output: output * 0.5)


def masked(head):
    head.register_forward_hook(lambda module, args, output: output.masked_fill(torch.arange(VOCAB) >= 90, -1e4))


def fed_twice(head):
    head.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))


def given_a_forward(head):
    own = head.forward
    head.forward = lambda hidden: own(hidden) + 0.25 * torch.arange(VOCAB)


@pytest.mark.parametrize("gradient", ["exact", "kv", "detached"])
@pytest.mark.parametrize("around", [scaled, masked, fed_twice, given_a_forward])
def test_what_is_around_the_head_counts(around, gradient):
    model, input_ids = ROUTABLE["llama"](), tokens()
    around(model.lm_head)
    plain = model(input_ids=input_ids, labels=input_ids).loss
    plain.backward()
    wanted = gradients(model)
    wrapped = CGGRModel(model, gradient=gradient, min_tokens_ratio=1.0).train()
    with pytest.warns(UserWarning, match="its own logits are used"):
        loss = wrapped(input_ids, labels=input_ids)
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-6)
    assert relative_error(gradients(model), wanted) <= 1e-5
    with warnings.catch_warnings(action="error"):
        wrapped(input_ids, labels=input_ids)  # said once


@pytest.mark.filterwarnings("ignore:the head of:UserWarning")
@pytest.mark.parametrize("engine", ["interleaved", "two_pass"])
def test_kept_rows_go_through_the_hook_too(engine):
    model, input_ids = ROUTABLE["llama"](), tokens()
    masked(model.lm_head)
    hooked = CGGRModel(model, selection="random", engine=engine).train()(input_ids, labels=input_ids, draw=3)
    model.lm_head._forward_hooks.clear()
    bare = CGGRModel(model, selection="random", engine=engine).train()(input_ids, labels=input_ids, draw=3)
    assert hooked < bare  # seven classes less to choose among
