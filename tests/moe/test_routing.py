"""The reference of routing: weights, choices, losses and counts against values computed by hand or in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cggr_moe.routing import moe_route_reference as route


def test_a_case_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], dtype=torch.float64))
    routing = route(logits, None, None, 2, True)
    assert routing.index.tolist() == [[0, 1], [2, 1]]
    torch.testing.assert_close(
        routing.weight, torch.tensor([[5 / 8, 3 / 8], [7 / 9, 2 / 9]], dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert routing.tokens_per_expert.tolist() == [1, 2, 1]
    # f = (1/4, 1/2, 1/4), P = (0.3, 0.25, 0.45), the log-sum-exps are 0.
    assert routing.balance_loss == pytest.approx(3 * (0.075 + 0.125 + 0.1125))
    assert routing.z_loss == pytest.approx(0.0, abs=1e-15)
    assert route(logits + 2, None, None, 2, True).z_loss == pytest.approx(4.0)
    torch.testing.assert_close(route(logits, None, None, 2, False).weight[0], logits[0, :2].exp())
    assert routing.bad == 0


def test_balanced_load_is_one_and_collapse_is_the_number_of_experts():
    even = torch.eye(4).repeat(8, 1) * 1e-3
    assert route(even, None, None, 1, True).balance_loss == pytest.approx(1.0, abs=1e-3)
    collapsed = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(8, 1)
    assert route(collapsed, None, None, 1, True).balance_loss == pytest.approx(4.0)
    assert route(torch.zeros(8, 4), None, None, 2, True).entropy == pytest.approx(torch.tensor(4.0).log().item())


def test_equal_scores_go_to_the_lower_experts():
    assert route(torch.zeros(3, 6), None, None, 3, True).index.tolist() == [[0, 1, 2]] * 3


def test_minus_infinity_is_never_chosen_and_has_no_gradient():
    logits = torch.tensor([[0.0, -torch.inf, 1.0], [2.0, -torch.inf, -torch.inf]], requires_grad=True)
    routing = route(logits, torch.tensor([0.0, 9.0, 0.0]), None, 2, True)
    assert routing.index.tolist() == [[2, 0], [0, -1]]
    assert routing.weight[1].tolist() == [1.0, 0.0]
    assert routing.tokens_per_expert.tolist() == [2, 0, 1]
    assert routing.entropy.isfinite()
    loss = routing.weight[:, 0].sum() + routing.balance_loss + routing.z_loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.isfinite().all()
    assert (gradient[:, 1] == 0).all()


def test_tokens_without_a_softmax_are_counted_and_go_nowhere():
    logits = torch.zeros(5, 3)
    logits[0, 1], logits[1, 1], logits[2] = torch.nan, torch.inf, -torch.inf
    logits.requires_grad_()
    routing = route(logits, None, torch.tensor([True, True, True, True, False]), 2, True)
    assert routing.bad == 3
    assert (routing.index[[0, 1, 2, 4]] == -1).all()
    assert routing.tokens_per_expert.tolist() == [1, 1, 0]
    (gradient,) = torch.autograd.grad(routing.weight.sum() + routing.balance_loss + routing.z_loss, logits)
    assert gradient.isfinite().all()
    assert (gradient[[0, 1, 2, 4]] == 0).all()


def test_the_bias_changes_the_choice_and_not_the_weight():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    routing = route(logits, torch.tensor([0.0, 0.0, 1.0]), None, 1, False)
    assert routing.index.item() == 2
    assert routing.weight.item() == pytest.approx(logits.softmax(1)[0, 2].item())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gradients(norm, top_k):
    torch.manual_seed(top_k)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([True, True, False, True, True, True])

    def outputs(x):
        routing = route(x, None, keep, top_k, norm)
        return routing.weight, routing.balance_loss, routing.z_loss

    assert torch.autograd.gradcheck(outputs, (logits,))


def test_nothing_to_route_is_a_connected_zero():
    logits = torch.randn(3, 4, requires_grad=True)
    for routing in (
        route(logits, None, torch.zeros(3, dtype=torch.bool), 2, True),
        route(logits[:0], None, None, 2, True),
    ):
        assert routing.balance_loss == 0
        (gradient,) = torch.autograd.grad(routing.balance_loss + routing.z_loss, logits)
        assert (gradient == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_every_token_has_top_k_different_experts_and_weights_of_sum_one(T, E, data):
    top_k = data.draw(st.integers(1, E))
    logits = torch.randn(T, E, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    routing = route(logits, None, None, top_k, True)
    assert all(len(set(row)) == top_k for row in routing.index.tolist())
    torch.testing.assert_close(routing.weight.sum(1), torch.ones(T))
    assert (routing.weight.diff(dim=1) <= 0).all()
    assert routing.tokens_per_expert.sum() == T * top_k
    # Routing knows nothing of the order of the tokens.
    order = torch.randperm(T, generator=torch.Generator().manual_seed(T))
    assert torch.equal(route(logits[order], None, None, top_k, True).index, routing.index[order])
