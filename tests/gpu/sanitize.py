"""One call of every kernel at odd sizes, for ``compute-sanitizer python tests/gpu/sanitize.py``.

Allocations are not cached, so that reads and writes past a tensor are detected. ``--ops`` selects some of the ops, so
that several processes can share the work. Run it without the sanitizer first to compile the kernels, which is slow
under it.
"""

import argparse
import os

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch
from torch import Tensor

from cggr_kernels.difficulty import difficulty
from cggr_kernels.linear_cross_entropy import linear_cross_entropy
from cggr_kernels.linear_difficulty import linear_difficulty
from cggr_kernels.moe_experts import moe_experts
from cggr_kernels.moe_route import moe_route
from cggr_kernels.quantize_rows import quantize_rows
from cggr_kernels.quantize_silu_mul import quantize_silu_mul
from cggr_kernels.rotary import rotary
from cggr_kernels.routed_attention import routed_attention
from cggr_kernels.select import STRATEGIES, select
from cggr_kernels.silu_mul import silu_mul


def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random numbers that take a gradient."""
    return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)


def run_difficulty() -> None:
    """Logits of few and of many classes."""
    for rows, V in ((1, 1), (3, 257), (2, 5003), (2, 8192)):
        difficulty(leaf(rows, V).detach(), torch.randint(0, V, (rows,), device="cuda"))


def head_problem() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head weight, and targets of which one is ignored and one does not exist."""
    return leaf(5, 16), leaf(4999, 16), torch.tensor([1, -100, 4998, 4999, 0], device="cuda")


def run_linear_difficulty() -> None:
    """Statistics without logits."""
    linear_difficulty(*head_problem())


def run_linear_cross_entropy() -> None:
    """Chunks of logits, all of them at once, and losses of rows; one row does not exist."""
    hidden, weight, targets = head_problem()
    for max_logits in (None, 2**20):
        rows = torch.tensor([0, 2, 3, 7], device="cuda")
        (2 * linear_cross_entropy(hidden, weight, targets, rows, max_logits=max_logits)).backward()
    linear_cross_entropy(hidden, weight, targets, reduction="none").sum().backward()


def run_routed_attention() -> None:
    """Numbers of heads that are powers of two and others; a row of 20 numbers is no whole step of the copy engine.

    One of the long documents lets whole blocks go unmasked.
    """
    position = torch.randperm(203, device="cuda")[None, :37].sort(1).values
    segment = torch.arange(203, device="cuda")[None] // 50
    long = torch.tensor([[-1] * 11 + [0] * 142 + [1] * 50], device="cuda")
    dtypes = {64: (torch.bfloat16, torch.float32)}
    for H, D in ((8, 64), (6, 128), (4, 256), (2, 20)):
        for dtype in dtypes.get(D, (torch.bfloat16,)):
            q, k, v = (leaf(1, n, h, D, dtype=dtype) for n, h in ((37, H), (203, 2), (203, 2)))
            masks = (
                {},
                {"segment": long},
                {"segment": segment, "window": 30, "softcap": 9.0},
                {"key_gradient": "kept"},
            )
            for options in masks:
                routed_attention(q, k, v, position, **options).sum().backward()


def run_select() -> None:
    """Every strategy."""
    score = torch.rand(3, 1501, device="cuda")
    for strategy in STRATEGIES:
        select(score, score > 0.1, 0.3, strategy, 451)


def run_experts() -> None:
    """Routing and experts, forward and backward."""
    for T, H, I, E, K in ((1, 8, 8, 1, 1), (203, 72, 136, 7, 3)):
        x, gate_up, down = leaf(T, H), leaf(E, 2 * I, H), leaf(E, H, I)
        logits = leaf(T, E, dtype=torch.float32)
        mask = torch.arange(T, device="cuda") % 3 != 1
        route_weight, index, balance, *_ = moe_route(logits, None, mask, K, True)
        (moe_experts(x, gate_up, down, index, route_weight).sum() + balance).backward()


def run_rotary() -> None:
    """Heads in one part and in several, halves that are no power of two, and angles of one row for all."""
    for rows, (HQ, HKV), D in ((1, (1, 1), 2), (2, (33, 3), 64), (2, (5, 5), 80)):
        q, k = leaf(2, 7, HQ, D), leaf(2, 7, HKV, D)
        angle = torch.randn(rows, 7, D, device="cuda", dtype=torch.bfloat16)
        turned = rotary(q.transpose(1, 2), k.transpose(1, 2), angle.cos(), angle.sin())
        sum(part.sum() for part in turned).backward()


def run_silu_mul() -> None:
    """Less than a block, and a block and a bit."""
    for shape in ((1,), (7, 257), (2, 1025)):
        silu_mul(leaf(*shape), leaf(*shape)).sum().backward()


def run_quantize() -> None:
    """Rows shorter and longer than what is kept in registers."""
    for N, K in ((1, 1), (3, 257), (5, 14336), (2, 16385)):
        gate, up = leaf(N, K), leaf(N, K)
        quantize_rows(gate)
        quantize_silu_mul(gate, up)


OPS = {
    "difficulty": run_difficulty,
    "linear_difficulty": run_linear_difficulty,
    "linear_cross_entropy": run_linear_cross_entropy,
    "routed_attention": run_routed_attention,
    "select": run_select,
    "rotary": run_rotary,
    "silu_mul": run_silu_mul,
    "quantize": run_quantize,
    "experts": run_experts,
}


def main() -> None:
    """Run the chosen ops."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    torch.manual_seed(0)
    for op in parser.parse_args().ops:
        OPS[op]()
        torch.cuda.synchronize()
        print(f"sanitize: {op} done", flush=True)


if __name__ == "__main__":
    main()
