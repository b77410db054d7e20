"""Routing of tokens to experts: softmax, top-k experts, and the losses and counts derived from the same numbers.

Three kernels: one pass over the logits, one program that sums the blocks' statistics in a fixed order, and one pass
for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from cggr_kernels._checks import check_device, check_first_derivatives, check_float
from cggr_kernels._launching import Launch
from cggr_kernels._library import register
from cggr_kernels.moe_details._route import route_gradient_kernel, route_kernel, route_statistics_kernel

MAX_EXPERTS = 1024
_TILE = 4096  # logits that one program holds
_MOST_TOKENS = 64
_STATISTICS_TILE = 8192
_MOST_BLOCKS = 256

_route, _statistics, _route_gradient = (
    Launch(kernel) for kernel in (route_kernel, route_statistics_kernel, route_gradient_kernel)
)


def _blocks(E: int) -> dict[str, int]:
    block_e = int(triton.next_power_of_2(E))
    return {"BLOCK_T": min(_MOST_TOKENS, _TILE // block_e), "BLOCK_E": block_e}


def _launch(
    logits: Tensor, bias: Tensor | None, keep: Tensor | None, top_k: int, norm_topk_prob: bool
) -> tuple[Tensor, ...]:
    T, E = logits.shape
    weight, index, balance, z, entropy, load, bad, lse, slope = _fake(logits, bias, keep, top_k, norm_topk_prob)
    blocks = _blocks(E)
    count = triton.cdiv(T, blocks["BLOCK_T"])
    partial = torch.empty(count, 2 * E + 4, dtype=torch.float32, device=logits.device)
    if T:
        _route(
            count,
            logits,
            logits if bias is None else bias,
            logits if keep is None else keep,
            weight,
            index,
            lse,
            partial,
            T,
            E,
            top_k,
            HAS_BIAS=bias is not None,
            HAS_KEEP=keep is not None,
            NORMALISE=norm_topk_prob,
            BLOCK_K=triton.next_power_of_2(top_k),
            num_warps=4,
            **blocks,
        )
    block_b = min(triton.next_power_of_2(count), _MOST_BLOCKS, _STATISTICS_TILE // blocks["BLOCK_E"])
    _statistics(
        1,
        partial,
        balance,
        z,
        entropy,
        load,
        bad,
        slope,
        count,
        E,
        BLOCK_B=max(1, block_b),
        BLOCK_E=blocks["BLOCK_E"],
        num_warps=16,
    )
    return weight, index, balance, z, entropy, load, bad, lse, slope


def _fake(
    logits: Tensor, bias: Tensor | None, keep: Tensor | None, top_k: int, norm_topk_prob: bool
) -> tuple[Tensor, ...]:
    T, E = logits.shape
    return (
        logits.new_empty(T, top_k, dtype=torch.float32),
        logits.new_empty(T, top_k, dtype=torch.int64),
        *(logits.new_empty((), dtype=torch.float32) for _ in range(3)),
        logits.new_empty(E, dtype=torch.int64),
        logits.new_empty((), dtype=torch.int64),
        logits.new_empty(T, dtype=torch.float32),
        logits.new_empty(E + 1, dtype=torch.float32),
    )


def _launch_gradient(
    logits: Tensor,
    lse: Tensor,
    index: Tensor,
    slope: Tensor,
    d_weight: Tensor,
    d_balance: Tensor,
    d_z: Tensor,
    norm_topk_prob: bool,
) -> Tensor:
    T, E = logits.shape
    d_logits = torch.empty_like(logits)
    if T:
        blocks = _blocks(E)
        _route_gradient(
            triton.cdiv(T, blocks["BLOCK_T"]),
            logits,
            lse,
            index,
            slope,
            d_weight,
            d_balance,
            d_z,
            d_logits,
            T,
            E,
            index.shape[1],
            NORMALISE=norm_topk_prob,
            num_warps=4,
            **blocks,
        )
    return d_logits


def _fake_gradient(
    logits: Tensor,
    lse: Tensor,
    index: Tensor,
    slope: Tensor,
    d_weight: Tensor,
    d_balance: Tensor,
    d_z: Tensor,
    norm_topk_prob: bool,
) -> Tensor:
    return torch.empty_like(logits)


_forward = register(
    "moe_route(Tensor logits, Tensor? bias, Tensor? keep, int top_k, bool norm_topk_prob)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)
_gradient = register(
    "moe_route_gradient(Tensor logits, Tensor lse, Tensor index, Tensor slope, Tensor d_weight, Tensor d_balance,"
    " Tensor d_z, bool norm_topk_prob) -> Tensor",
    _launch_gradient,
    _fake_gradient,
)


class _Route(torch.autograd.Function):
    """Autograd function of the op: gradients of the weights and both losses with respect to the logits.

    Outputs without a gradient are not returned here: autograd would allocate zeros for them in every backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        weight: Tensor,
        balance: Tensor,
        z: Tensor,
        index: Tensor,
        lse: Tensor,
        slope: Tensor,
        norm_topk_prob: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(logits, lse, index, slope)
        ctx.norm_topk_prob = norm_topk_prob
        return weight.view_as(weight), balance.view_as(balance), z.view_as(z)

    @staticmethod
    def backward(ctx: Any, d_weight: Tensor, d_balance: Tensor, d_z: Tensor) -> tuple[Tensor | None, ...]:
        check_first_derivatives()
        upstream = (d_weight.contiguous(), d_balance.contiguous(), d_z.contiguous())
        return _gradient(*ctx.saved_tensors, *upstream, ctx.norm_topk_prob), *[None] * 7


def _check(logits: Tensor, bias: Tensor | None, keep: Tensor | None, top_k: int) -> None:
    check_float("logits", logits, 2)
    T, E = logits.shape
    if not 1 <= E <= MAX_EXPERTS:
        raise ValueError(
            f"logits has {E} experts; the kernels take 1 to {MAX_EXPERTS}. Use CGGR_BACKEND=torch for more"
        )
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k must be 1 to {E}, the number of experts, got {top_k}")
    if bias is not None and (bias.dtype != torch.float32 or tuple(bias.shape) != (E,)):
        raise ValueError(f"bias must be float32 of shape ({E},), got {bias.dtype} of shape {tuple(bias.shape)}")
    if keep is not None and (keep.dtype != torch.bool or tuple(keep.shape) != (T,)):
        raise ValueError(f"keep must be bool of shape ({T},), got {keep.dtype} of shape {tuple(keep.shape)}")
    check_device(logits=logits, bias=bias, keep=keep)


def moe_route(
    logits: Tensor, bias: Tensor | None, keep: Tensor | None, top_k: int, norm_topk_prob: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choose ``top_k`` experts for each token; bitwise reproducible, and the host reads nothing.

    A choice is null (index −1, weight 0) where the token is not in ``keep``, its logits have no softmax (NaN, +inf, all
    −inf), or the expert's probability is exactly 0. Among equal scores the lower expert is taken.

    Args:
        logits: ``[T, E]``, float32, float16 or bfloat16, E at most 1024.
        bias: ``[E]``, float32, added to the probabilities when choosing, but not to the weights; ``None`` for no bias.
        keep: ``[T]``, bool: the tokens to route; ``None`` for all.
        top_k: Experts per token, K.
        norm_topk_prob: Whether to divide a token's weights by their sum.

    Returns:
        ``weight`` ``[T, K]`` float32, ``index`` ``[T, K]`` int64 (best first), the load-balancing loss, the z-loss
        (both 0-dim float32), the number of choices that fell on each expert ``[E]`` int64, the mean entropy in nats,
        and the number of bad tokens (0-dim int64). The weights and both losses are differentiable in ``logits``.

    Raises:
        TypeError: If the dtype of ``logits`` is not accepted.
        ValueError: If a shape, dtype or device does not match, or ``top_k`` is out of range.

    Example:
        >>> weight, index, *rest = moe_route(torch.tensor([[1.0, 3.0, 2.0]], device="cuda"), None, None, 2, True)
        >>> index.tolist()
        [[1, 2]]
    """
    _check(logits, bias, keep, top_k)
    bias = None if bias is None else bias.contiguous()
    keep = None if keep is None else keep.contiguous()
    logits = logits.contiguous()
    made = _forward(logits.detach(), bias, keep, top_k, norm_topk_prob)
    weight, index, balance, z, entropy, load, bad, lse, slope = made
    if torch.is_grad_enabled() and logits.requires_grad:
        weight, balance, z = _Route.apply(logits, weight, balance, z, index, lse, slope, norm_topk_prob)
    return weight, index, balance, z, load, entropy, bad
