"""A default dtype other than the model's changes nothing."""

import pytest
import torch

from tests.support.model_steps import MODES, backward, routed, tokens
from tests.support.reference_routing import relative_error
from tests.support.tiny_models import ROUTABLE


@pytest.fixture(params=[torch.float64, torch.bfloat16])
def other_default(request):
    """Set while the test runs."""
    before = torch.get_default_dtype()
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("gradient", MODES)
def test_a_step_is_the_same(gradient, other_default):
    model, input_ids = ROUTABLE["llama"](), tokens()
    loss, grads = backward(routed(model, gradient, min_tokens_ratio=0.5).train(), input_ids, draw=1)
    torch.set_default_dtype(other_default)
    other, other_grads = backward(routed(model, gradient, min_tokens_ratio=0.5).train(), input_ids, draw=1)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    assert relative_error(other_grads, grads) <= 1e-5
