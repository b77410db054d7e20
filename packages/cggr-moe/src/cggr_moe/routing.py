"""Which experts each token goes to: the reference of the op ``moe_route``.

Softmax over the experts, the ``top_k`` best of them, and the losses and counts derived from the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cggr_core.backends import register_reference

__all__ = ["Routing", "moe_route_reference"]


class Routing(NamedTuple):
    """Result of the op ``moe_route``.

    ``weight``, ``balance_loss`` and ``z_loss`` are differentiable with respect to the logits.

    Attributes:
        weight: ``[T, K]``, float32 (float64 for float64 logits): weight of each choice, 0 where it is null.
        index: ``[T, K]``, int64: the expert of each choice, best first; −1 where the choice is null.
        balance_loss: 0-dim: ``E · Σ_e f_e P_e``, see :class:`cggr_moe.PersistentTRMLP`.
        z_loss: 0-dim: mean over the routed tokens of the squared log-sum-exp of the logits.
        tokens_per_expert: ``[E]``, int64.
        entropy: 0-dim, nats: mean entropy of the routing distribution of the routed tokens.
        bad: 0-dim, int64: tokens whose logits have no softmax (NaN, +inf, or all −inf).
    """

    weight: Tensor
    index: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    tokens_per_expert: Tensor
    entropy: Tensor
    bad: Tensor


def moe_route_reference(
    logits: Tensor, bias: Tensor | None, keep: Tensor | None, top_k: int, norm_topk_prob: bool
) -> Routing:
    """Plain-torch op ``moe_route``.

    A choice is null (it costs nothing and has weight 0) if the token is not in ``keep``, its logits have no softmax, or
    the expert's probability is exactly 0 (a logit of −inf). Ties go to the lower expert.

    Args:
        logits: ``[T, E]``, any floating dtype.
        bias: ``[E]``, added to the probabilities when choosing, but not to the weights; None for no bias.
        keep: ``[T]`` bool: the tokens to route; None for all.
        top_k: Experts per token, K.
        norm_topk_prob: Whether to divide a token's weights by their sum.

    Returns:
        The routing.
    """
    E = logits.shape[1]
    logits_TE = logits.to(torch.promote_types(logits.dtype, torch.float32))
    sound_T = logits_TE.detach().logsumexp(1).isfinite()
    wanted_T = torch.ones_like(sound_T) if keep is None else keep
    routed_T = sound_T & wanted_T
    # A token that is not routed must not reach a gradient, whatever it holds.
    logits_TE = logits_TE.masked_fill(~routed_T[:, None], 0.0)
    probability_TE = logits_TE.softmax(1)
    score_TE = probability_TE.detach() if bias is None else probability_TE.detach() + bias
    score_TE = score_TE.masked_fill(probability_TE == 0, -torch.inf)
    index_TK = score_TE.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    weight_TK = probability_TE.gather(1, index_TK)
    null_TK = (weight_TK == 0) | ~routed_T[:, None]
    if norm_topk_prob:
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
    index_TK = index_TK.masked_fill(null_TK, -1)
    # Null choices are counted in an extra slot, which is cut off.
    places = index_TK.masked_fill(null_TK, E).flatten()
    load_E = places.new_zeros(E + 1).scatter_add(0, places, torch.ones_like(places))[:E]
    tokens = routed_T.sum().clamp(min=1)
    share_E = load_E / load_E.sum().clamp(min=1)
    mean_E = (probability_TE * routed_T[:, None]).sum(0) / tokens
    squares_T = logits_TE.logsumexp(1).square()
    entropy_T = torch.special.entr(probability_TE.detach()).sum(1)
    return Routing(
        weight=weight_TK.masked_fill(null_TK, 0.0),
        index=index_TK,
        balance_loss=E * (share_E.to(mean_E.dtype) * mean_E).sum(),
        z_loss=(squares_T * routed_T).sum() / tokens,
        tokens_per_expert=load_E,
        entropy=(entropy_T * routed_T).sum() / tokens,
        bad=(wanted_T & ~sound_T).sum(),
    )


register_reference("moe_route", moe_route_reference)
