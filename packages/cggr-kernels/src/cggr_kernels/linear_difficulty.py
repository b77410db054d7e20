"""Statistics of next-token distributions straight from hidden states and head weight.

The logits are made for a chunk of rows at a time by the vendor's matrix product and read once by the kernel of
:mod:`cggr_kernels.difficulty`. On an H200 that is faster than a fused kernel whose matrix product would have to keep up
with the vendor's, and the buffer does not grow with the number of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_kernels._checks import check_device, check_float, check_index, check_vocabulary
from cggr_kernels._library import register
from cggr_kernels.difficulty import Statistics, launch_difficulty

# Logits held at once: 1,024 rows of a vocabulary of 128k, the fewest that leave the product bound by arithmetic.
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
    # Rows of the buffer start at multiples of 16 bytes, so that the kernel loads as much at once as it can.
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

    The same five as :func:`cggr_kernels.difficulty.difficulty`; the logits never exist for all rows at once.

    Args:
        hidden: Final hidden states, shape ``[N, H]``, float32, float16 or bfloat16.
        weight: The head's matrix, shape ``[V, H]``, dtype of ``hidden`` unless autocast is on.
        targets: Aligned class indices, shape ``[N]``, int64; without them nll and gradnorm are 0.
        bias: The head's bias, shape ``[V]``.
        softcap: Bound of the logits; ``None`` for none.
        scale: Factor on the logits before the softcap; ``None`` for 1.
        ignore_index: Rows with this target get 0 in all five.

    Returns:
        Five float32 tensors of shape ``[N]``: entropy, confidence, margin, nll, gradnorm.

    Raises:
        TypeError: If a dtype is not accepted, or those of ``hidden`` and ``weight`` differ.
        ValueError: If shapes or devices do not fit.

    Example:
        >>> hidden = torch.zeros(1, 8, device="cuda")
        >>> linear_difficulty(hidden, torch.zeros(4, 8, device="cuda"))[0]
        tensor([1.3863], device='cuda:0')
    """
    check_float("hidden", hidden, 2)
    check_float("weight", weight, 2)
    N, H = hidden.shape
    if weight.shape[1] != H:
        raise ValueError(f"weight must be [V, {H}] for hidden {tuple(hidden.shape)}, got {tuple(weight.shape)}")
    check_vocabulary("weight", weight.shape[0])
    if targets is not None:
        check_index("targets", targets, (N,))
        targets = targets.contiguous()
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, value in (("softcap", softcap), ("scale", scale)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be a positive number or None, got {value}")
    check_device(hidden=hidden, weight=weight, targets=targets, bias=bias)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight is {weight.dtype} and hidden is {hidden.dtype}; cast them to one dtype")
    bias = None if bias is None else bias.to(hidden.dtype)
    with torch.autocast(device_type, enabled=False):
        statistics = _linear_difficulty(hidden, weight, targets, bias, softcap, scale, ignore_index)
    return statistics[0], statistics[1], statistics[2], statistics[3], statistics[4]
