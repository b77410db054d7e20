"""One call of every kernel at odd sizes, for ``compute-sanitizer python tests/gpu/sanitize.py``.

Allocations are not cached, so that a read or write past a tensor is seen.
"""

import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch

from cggr_kernels.difficulty import difficulty
from cggr_kernels.linear_cross_entropy import linear_cross_entropy
from cggr_kernels.linear_difficulty import linear_difficulty
from cggr_kernels.moe_experts import moe_experts
from cggr_kernels.moe_route import moe_route
from cggr_kernels.routed_attention import routed_attention
from cggr_kernels.select import STRATEGIES, select


def main() -> None:
    """Run them."""
    torch.manual_seed(0)
    device = "cuda"
    for rows, V in ((1, 1), (3, 257), (2, 5003), (2, 8192)):
        logits = torch.randn(rows, V, device=device, dtype=torch.bfloat16)
        difficulty(logits, torch.randint(0, V, (rows,), device=device))
    hidden = torch.randn(5, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4999, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.tensor([1, -100, 4998, 4999, 0], device=device)
    linear_difficulty(hidden, weight, targets)
    for max_logits in (None, 2**20):
        rows = torch.tensor([0, 2, 3, 7], device=device)
        (2 * linear_cross_entropy(hidden, weight, targets, rows, max_logits=max_logits)).backward()
    linear_cross_entropy(hidden, weight, targets, reduction="none").sum().backward()
    position = torch.randperm(203, device=device)[None, :37].sort(1).values
    segment = torch.arange(203, device=device)[None] // 50
    # Powers of two and other numbers of heads to a group; a row of 20 numbers is not a whole step of the copy engine.
    for H, D in ((8, 64), (6, 128), (4, 256), (2, 20)):
        q, k, v = (
            torch.randn(1, n, h, D, device=device, dtype=torch.bfloat16, requires_grad=True)
            for n, h in ((37, H), (203, 2), (203, 2))
        )
        for options in ({}, {"segment": segment, "window": 30, "softcap": 9.0}, {"key_gradient": "kept"}):
            routed_attention(q, k, v, position, **options).sum().backward()
    score = torch.rand(3, 1501, device=device)
    for strategy in STRATEGIES:
        select(score, score > 0.1, 0.3, strategy, 451)
    for T, H, I, E, K in ((1, 8, 8, 1, 1), (203, 72, 136, 7, 3)):
        x, gate_up, down = (
            torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True)
            for size in ((T, H), (E, 2 * I, H), (E, H, I))
        )
        logits = torch.randn(T, E, device=device, requires_grad=True)
        route_weight, index, balance, *_ = moe_route(logits, None, torch.arange(T, device=device) % 3 != 1, K, True)
        (moe_experts(x, gate_up, down, index, route_weight).sum() + balance).backward()
    torch.cuda.synchronize()
    print("sanitize: done")


if __name__ == "__main__":
    main()
