"""Statistics of next-token distributions, straight from hidden states and the head's weight.

The vendor's matrix product computes the logits of a chunk of rows at a time, and the kernel of
:mod:`cggr_kernels.difficulty` reads them once. On an H200 this beats a fused kernel, whose matrix product would have to
match the vendor's, and the buffer does not grow with the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_kernels._checks import check_device, check_index
from cggr_kernels._head import check_head, in_product_dtype
from cggr_kernels._library import register
from cggr_kernels.difficulty import Statistics, launch_difficulty

# Logits held at once: 1,024 rows of a 128k vocabulary, the fewest that keep the product compute-bound.
CHUNK_ELEMENTS = 2**27
MIN_ROWS = 256


def _launch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
    ignore_index: int,
) -> Tensor:
    N, V = hidden.shape[0], weight.shape[0]
    out_5N = torch.empty(5, N, dtype=torch.float32, device=hidden.device)
    rows = max(1, min(N, max(MIN_ROWS, CHUNK_ELEMENTS // V // 128 * 128)))
    # Rows of the buffer start at multiples of 16 bytes, for the widest loads.
    buffer = torch.empty(rows, -(-V // 8) * 8, dtype=hidden.dtype, device=hidden.device)
    for start in range(0, N, rows):
        end = min(start + rows, N)
        logits = buffer[: end - start, :V]
        if bias is None:
            torch.mm(hidden[start:end], weight.t(), out=logits)
        else:
            torch.addmm(bias, hidden[start:end], weight.t(), out=logits)
        chunk_targets = None if targets is None else targets[start:end]
        launch_difficulty(logits, chunk_targets, ignore_index, softcap, scale, out_5N[:, start:end])
    return out_5N


def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
    ignore_index: int,
) -> Tensor:
    return hidden.new_empty(5, hidden.shape[0], dtype=torch.float32)


_linear_difficulty = register(
    "linear_difficulty(Tensor hidden, Tensor weight, Tensor? targets, Tensor? bias, float? softcap, float? scale,"
    " int ignore_index) -> Tensor",
    _launch,
    _fake,
)


@torch.no_grad()
def linear_difficulty(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    ignore_index: int = -100,
) -> Statistics:
    """Statistics of ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``, without gradients.

    The same five statistics as :func:`cggr_kernels.difficulty.difficulty`; the full logits never exist at once.

    Args:
        hidden: Final hidden states, shape ``[N, H]``, float32, float16 or bfloat16.
        weight: The head's weight, shape ``[V, H]``, same dtype as ``hidden`` unless autocast is on.
        targets: Aligned class indices, shape ``[N]``, int64; without targets, nll and gradnorm are 0.
        bias: The head's bias, shape ``[V]``.
        softcap: Bound on the logits; ``None`` for none.
        scale: Factor on the logits before the softcap; ``None`` for 1.
        ignore_index: Rows with this target get 0 in all five statistics.

    Returns:
        Five float32 tensors of shape ``[N]``: entropy, confidence, margin, nll, gradnorm.

    Raises:
        TypeError: If a dtype is not accepted, or ``hidden`` and ``weight`` differ in dtype.
        ValueError: If shapes or devices do not match.

    Example:
        >>> hidden = torch.zeros(1, 8, device="cuda")
        >>> linear_difficulty(hidden, torch.zeros(4, 8, device="cuda"))[0]
        tensor([1.3863], device='cuda:0')
    """
    check_head(hidden, weight, bias, softcap=softcap, scale=scale)
    if targets is not None:
        check_index("targets", targets, (hidden.shape[0],))
        targets = targets.contiguous()
    check_device(hidden=hidden, weight=weight, targets=targets, bias=bias)
    hidden, weight, bias = in_product_dtype(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        statistics = _linear_difficulty(hidden, weight, targets, bias, softcap, scale, ignore_index)
    return statistics[0], statistics[1], statistics[2], statistics[3], statistics[4]
