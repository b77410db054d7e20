"""Attention of nearly all tokens of long rows, as plain causal attention of all of them.

On Hopper GPUs cuDNN's attention takes less time per query than a kernel for any queries, but cannot leave queries out.
Where few are missing, the rows are filled up.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# From here on, what cuDNN saves is more than what the missing queries and the copies cost.
LEAST_KEYS = 4096
LEAST_SHARE = 0.85
_HOPPER = (9, 0)
_LARGEST_HEAD = 128
_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def pays(query: Tensor, keys: int) -> bool:
    """Whether :func:`attend` is the faster way.

    Args:
        query: ``[B, H, Q, D]``.
        keys: Number of keys ``S``.
    """
    if torch.is_grad_enabled() or not query.is_cuda or keys < LEAST_KEYS or query.shape[2] < LEAST_SHARE * keys:
        return False
    size = query.shape[3]
    fits = query.dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= _LARGEST_HEAD
    return (
        fits and torch.cuda.get_device_capability(query.device) == _HOPPER and torch.backends.cuda.cudnn_sdp_enabled()
    )


def attend(query: Tensor, key: Tensor, value: Tensor, position: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of some positions of every row.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, Hkv, S, D]``.
        value: As ``key``.
        position: int64 ``[B, Q]``, distinct in every row.
        scaling: Factor of the scores; ``D ** -0.5`` by default.

    Returns:
        ``[B, Q, H, D]``.
    """
    batch, heads, _, size = query.shape
    length = key.shape[2]
    rows = (position + torch.arange(0, batch * length, length, device=position.device)[:, None]).flatten()
    # Missing queries stay uninitialised: nothing but their own output, which is left out, depends on them.
    every = query.new_empty(batch * length, heads * size)
    every.index_copy_(0, rows, query.transpose(1, 2).flatten(2).flatten(0, 1))
    with sdpa_kernel(_KERNELS, set_priority=True):
        output = scaled_dot_product_attention(
            every.view(batch, length, heads, size).transpose(1, 2), key, value,
            is_causal=True, scale=scaling, enable_gqa=heads != key.shape[1],
        )  # fmt: skip
    chosen = output.transpose(1, 2).reshape(batch * length, heads * size).index_select(0, rows)
    return chosen.view(batch, -1, heads, size)
