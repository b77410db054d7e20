"""Statistics of next-token distributions given by logits, in one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_kernels._checks import check_device, check_float, check_index, check_vocabulary
from cggr_kernels._library import INTERPRETED, register
from cggr_kernels.difficulty_details._difficulty import difficulty_kernel

LOG2E = 1.4426950408889634
Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def launch_difficulty(
    logits: Tensor,
    targets: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    scale: float | None,
    out_5N: Tensor,
) -> None:
    """Run the kernel on rows of the head's output ``[n, V]``.

    Args:
        logits: Shape ``[n, V]``, contiguous in the last dimension.
        targets: Shape ``[n]``, or ``None``.
        ignore_index: Target of rows that get 0.
        softcap: The statistics are those of ``softcap * tanh(scale * logits / softcap)``; ``None`` for none.
        scale: Factor on the logits; ``None`` for 1.
        out_5N: Receives the five statistics, shape ``[5, n]``, contiguous in the last dimension.
    """
    n, V = logits.shape
    if n == 0:
        return
    scale = 1.0 if scale is None else scale
    width = 16 // logits.element_size()
    # Four warps keep enough loads in flight on an H200 while a row's tail wastes little of its tile.
    warps = 4 if V > 4096 else 1
    difficulty_kernel[(n,)](
        logits,
        targets,
        out_5N,
        logits.stride(0),
        out_5N.stride(0),
        V,
        ignore_index,
        (scale if softcap is None else softcap) * LOG2E,
        1.0 if softcap is None else scale / softcap,
        HAS_SOFTCAP=softcap is not None,
        HAS_TARGETS=targets is not None,
        PEEL=logits.stride(0) % width != 0,
        WIDTH=width,
        LANES=128 if INTERPRETED else 32 * warps,
        num_warps=warps,
    )


def _launch(logits: Tensor, targets: Tensor | None, ignore_index: int) -> Tensor:
    out_5N = torch.empty(5, logits.shape[0], dtype=torch.float32, device=logits.device)
    launch_difficulty(logits, targets, ignore_index, None, None, out_5N)
    return out_5N


def _fake(logits: Tensor, targets: Tensor | None, ignore_index: int) -> Tensor:
    return logits.new_empty(5, logits.shape[0], dtype=torch.float32)


_difficulty = register("difficulty(Tensor logits, Tensor? targets, int ignore_index) -> Tensor", _launch, _fake)


@torch.no_grad()
def difficulty(logits: Tensor, targets: Tensor | None = None, ignore_index: int = -100) -> Statistics:
    r"""Entropy, confidence, margin, nll and logit-gradient norm of every row, without gradients.

    With ``p = softmax(logits)``: entropy ``-sum p ln p`` (nats), confidence ``max p``, margin ``p_1 - p_2`` of the two
    largest (0 when they tie; ``p_1`` for a single class), nll ``-ln p_y`` and gradnorm
    ``||p - onehot(y)||_2 = sqrt(sum p^2 - 2 p_y + 1)``, summed without ``p_y`` to avoid cancellation. The softmax is
    computed online (Milakov and Gimelshein, https://arxiv.org/abs/1805.02867): every logit is read once.

    Args:
        logits: Unnormalised log-probabilities, shape ``[N, V]``, float32, float16 or bfloat16. Rows may be strided; the
            last dimension must be contiguous. NaN in a row makes its statistics NaN.
        targets: Aligned class indices, shape ``[N]``, int64; without targets, nll and gradnorm are 0. A target outside
            ``[0, V)`` that is not ``ignore_index`` makes the statistics of its row NaN.
        ignore_index: Rows with this target get 0 in all five statistics, and their logits are not read.

    Returns:
        Five float32 tensors of shape ``[N]``: entropy, confidence, margin, nll, gradnorm.

    Raises:
        TypeError: If the dtype of ``logits`` is not accepted, or ``targets`` is not int64.
        ValueError: If shapes, strides or devices do not match, or the vocabulary is empty or larger than 1,048,576.

    Example:
        >>> entropy, confidence, margin, nll, gradnorm = difficulty(torch.zeros(1, 4, device="cuda"))
        >>> entropy
        tensor([1.3863], device='cuda:0')
    """
    check_float("logits", logits, 2)
    check_vocabulary("logits", logits.shape[1])
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(
            f"logits must be contiguous in the last dimension, got strides {logits.stride()}; call .contiguous()"
        )
    if targets is not None:
        check_index("targets", targets, (logits.shape[0],))
        targets = targets.contiguous()
    check_device(logits=logits, targets=targets)
    entropy, confidence, margin, nll, gradnorm = _difficulty(logits, targets, ignore_index)
    return entropy, confidence, margin, nll, gradnorm
