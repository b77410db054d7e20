"""Log-probabilities and entropies through a head, without a logits tensor of all rows in either pass.

:func:`linear_logprobs_by_autograd` is the plain form that the tests compare with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_core.checks import check_same_device, check_targets, first_derivatives_only
from cggr_core.head import accumulation_dtype, check_head, head_operands, product_dtype
from cggr_core.head_chunks import HeadChunks, HeadGradients, row_chunks, without_autocast
from cggr_core.linear_loss import linear_cross_entropy

__all__ = ["linear_logprobs", "linear_logprobs_by_autograd", "logits_logprobs"]


def logits_logprobs(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row, all logits at once.

    Args:
        logits: ``[N, V]``, any floating dtype.
        targets: int64 ``[N]``; ``ignore_index`` for ignored rows, which get 0 and no gradient.
        ignore_index: Target value of those rows.

    Returns:
        Log-probability and entropy in nats, float32 (float64 for float64 logits) ``[N]`` each.

    Example:
        >>> logprob, entropy = logits_logprobs(torch.zeros(2, 4), torch.tensor([1, -100]))
        >>> logprob.exp()
        tensor([0.2500, 1.0000])
    """
    live = targets != ignore_index
    logits = logits.to(accumulation_dtype(logits.dtype)).masked_fill(~live[:, None], 0.0)
    logprobs = logits.log_softmax(-1)
    logprob = logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    p = logprobs.exp()
    # 0 and not NaN, with its gradient, where a probability is 0.
    entropy = -(p * logprobs.masked_fill(p == 0.0, 0.0)).sum(-1)
    return logprob.masked_fill(~live, 0.0), entropy.masked_fill(~live, 0.0)


def linear_logprobs_by_autograd(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """:func:`linear_logprobs` with entropies in a few lines of autograd, all logits at once."""
    hidden, weight, bias = head_operands(hidden, weight, bias)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(accumulation_dtype(logits.dtype)) * (1.0 if scale is None else scale)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return logits_logprobs(logits, targets, ignore_index=ignore_index)


class _LogprobsAndEntropies(torch.autograd.Function):
    """Both values of each row; the backward recomputes the logits chunk by chunk for any gradients of the two."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dead: Tensor,
        softcap: float | None,
        scale: float | None,
        product_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        head = HeadChunks(hidden, weight, bias, targets, None, softcap, scale, product_dtype)
        logprob, entropy = (torch.zeros(targets.shape[0], dtype=head.dtype, device=hidden.device) for _ in range(2))
        for chunk in row_chunks(targets.shape[0], hidden, weight.shape[0]):
            nll, e, sums, _ = head.losses(head.rows(chunk, dead[chunk]), chunk)
            logprob[chunk] = -nll.masked_fill_(dead[chunk], 0.0)
            entropy[chunk] = torch.special.entr(e.div_(sums[:, None])).sum(1).masked_fill_(dead[chunk], 0.0)
        ctx.save_for_backward(hidden, weight, bias, targets, dead, entropy)
        ctx.softcap, ctx.scale, ctx.product_dtype = softcap, scale, product_dtype
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, logprob_grad: Tensor | None, entropy_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, dead, entropy = ctx.saved_tensors
        head = HeadChunks(hidden, weight, bias, targets, None, ctx.softcap, ctx.scale, ctx.product_dtype)
        gradients = HeadGradients(head, targets.shape[0], ctx.needs_input_grad[:3])
        # d logprob / d x = onehot - p and d entropy / d x = -p (ln p + entropy) = entr(p) - p entropy.
        of_logprob = torch.zeros_like(entropy) if logprob_grad is None else logprob_grad.masked_fill(dead, 0.0)
        of_p = of_logprob
        if entropy_grad is not None:
            entropy_grad = entropy_grad.masked_fill(dead, 0.0)
            of_p = of_p + entropy_grad * entropy
        factor = 1.0 if ctx.scale is None else ctx.scale
        for chunk in row_chunks(targets.shape[0], hidden, weight.shape[0]):
            rows = head.rows(chunk, dead[chunk])
            _, e, sums, slope = head.losses(rows, chunk)
            p = e.div_(sums[:, None])
            spread = None if entropy_grad is None else torch.special.entr(p).mul_(entropy_grad[chunk, None])
            grad = p.mul_(-of_p[chunk, None])
            if spread is not None:
                grad.add_(spread)
            grad.scatter_add_(1, head.targets[chunk, None], of_logprob[chunk, None])
            if slope is not None:
                grad.mul_(slope)
            gradients.add(grad.mul_(factor), rows, head.weight, chunk)
        found = gradients.hidden, gradients.weight, gradients.bias
        as_given = (
            None if grad is None or operand is None else grad.to(operand.dtype)
            for grad, operand in zip(found, (hidden, weight, bias), strict=True)
        )
        return *as_given, None, None, None, None, None


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    entropy: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities under ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``, differentiable.

    The logits exist for a chunk of rows at a time, in the forward pass and once more in the backward pass. Under
    autocast the products run in its dtype; everything after them, and the gradient of ``weight``, is in float32.

    Args:
        hidden: Final hidden states, ``[N, H]``.
        weight: The head's matrix, ``[V, H]``.
        targets: int64 ``[N]``; ``ignore_index`` for ignored rows, which get 0 and no gradient whatever they contain.
        entropy: Also compute entropies, which are differentiable too.
        bias: The head's bias, ``[V]``.
        softcap: Bound of the logits; ``None`` for none.
        scale: Factor on the logits before the softcap; ``None`` for 1. A temperature T is ``scale / T`` with
            ``softcap / T``.
        ignore_index: Target value of ignored rows.

    Returns:
        Log-probabilities ``[N]`` and, if requested, entropies ``[N]``; in nats, float32 (float64 for float64 operands).

    Raises:
        TypeError: If a dtype is wrong, or those of ``hidden`` and ``weight`` differ outside of autocast.
        ValueError: If shapes or devices disagree, or (on CPU) a target is outside the vocabulary.

    Example:
        >>> hidden = torch.zeros(2, 8, requires_grad=True)
        >>> logprob, _ = linear_logprobs(hidden, torch.zeros(4, 8), torch.tensor([1, 2]))
        >>> logprob.exp()
        tensor([0.2500, 0.2500], grad_fn=<ExpBackward0>)
    """
    if not entropy:
        nll = linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=bias,
            softcap=softcap,
            scale=scale,
            ignore_index=ignore_index,
            reduction="none",
        )
        return -nll, None
    check_head(hidden, weight, bias, softcap, scale)
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden must be [N, H], got shape {tuple(hidden.shape)}; flatten it with hidden.flatten(0, -2)"
        )
    targets = check_targets("targets", targets, hidden.shape[:1], weight.shape[0], ignore_index, hidden, "hidden")
    check_same_device("targets", targets, "hidden", hidden)
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    dead = targets == ignore_index
    dtype = product_dtype(hidden, weight)
    return without_autocast(_LogprobsAndEntropies, hidden, weight, bias, targets, dead, softcap, scale, dtype)
