"""Routed attention beside flex_attention with the same mask, SDPA with a dense one, and flash on all queries."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable

import torch

from benchmarks._kernels import Call, Table


def bench_attention(table: Table, arguments: argparse.Namespace) -> None:
    """Attention of a quarter of the positions, beside flex_attention with the same mask and flash on the whole."""
    from cggr_kernels.routed_attention import routed_attention

    shapes = [(B, S, 32, 8, D, 1.5) for D in (128, 64) for B, S in ((8, 2048), (2, 8192))]
    for B, S, H, HKV, D, wanted in (*shapes, (2, 8192, 16, 8, 256, 1.0)):
        bench_attention_shape(table, arguments, routed_attention, B, S, H, HKV, D, wanted)
        gc.collect()
        torch.cuda.empty_cache()


def bench_attention_shape(
    table: Table,
    arguments: argparse.Namespace,
    routed_attention: Callable[..., torch.Tensor],
    B: int,
    S: int,
    H: int,
    HKV: int,
    D: int,
    wanted: float,
) -> None:
    """One shape, whose bar is ``wanted`` times the speed of flex_attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    K = S // 4

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    q, k, v, full_q = leaf(B, K, H, D), leaf(B, S, HKV, D), leaf(B, S, HKV, D), leaf(B, S, H, D)
    d_out, full_d_out = (torch.randn_like(x) for x in (q, full_q))
    position = torch.rand(B, S, device="cuda").argsort(1)[:, :K].sort(1).values
    visible = torch.arange(S, device="cuda") <= position[:, :, None]

    def both(out: Callable[[], torch.Tensor], query: torch.Tensor, gradient: torch.Tensor) -> Call:
        return lambda: torch.autograd.grad(out(), (query, k, v), gradient)

    def heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [x.transpose(1, 2) for x in tensors]

    def flash() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(*heads_first(full_q, k, v), is_causal=True, enable_gqa=True).transpose(
                1, 2
            )

    def with_mask() -> torch.Tensor:
        inputs = heads_first(q, *(x.repeat_interleave(H // HKV, 2) for x in (k, v)))
        return scaled_dot_product_attention(*inputs, attn_mask=visible[:, None]).transpose(1, 2)

    candidates: dict[str, Call] = {
        "SDPA with a mask": both(with_mask, q, d_out),
        "cggr": both(lambda: routed_attention(q, k, v, position), q, d_out),
        "cggr, forward": lambda: routed_attention(q.detach(), k.detach(), v.detach(), position),
        "cggr, gradient of kept keys": both(lambda: routed_attention(q, k, v, position, key_gradient="kept"), q, d_out),
        "SDPA-flash, all queries": both(flash, full_q, full_d_out),
        "SDPA-flash, all queries, forward": flash,
    }
    if arguments.compiled:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def mask(b: torch.Tensor, h: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return position[b, query] >= key

        block_mask = create_block_mask(mask, B, None, K, S, device="cuda")
        compiled = torch.compile(flex_attention, dynamic=False)

        def flex() -> torch.Tensor:
            return compiled(*heads_first(q, k, v), block_mask=block_mask, enable_gqa=True).transpose(1, 2)

        candidates["flex_attention, compiled"] = both(flex, q, d_out)
    products = 2 * D * H * int((position + 1).sum())
    all_products = 2 * D * H * B * S * (S + 1) // 2

    def rate(name: str, seconds: float) -> float:
        used = all_products if name.startswith("SDPA-flash") else products
        return (2 if "forward" in name else 7) * used / seconds

    op = f"routed_attention B{B} S{S} {H}/{HKV} heads of {D}, 25% kept, forward + backward"
    table.measure(op, candidates, "SDPA with a mask", flop_per_second=rate)
    rows = {name: table.rows.get(f"{op}: {name}") for name in candidates}
    ours = rows["cggr"]
    assert ours is not None
    if flex_row := rows.get("flex_attention, compiled"):
        executed = 9 / 7 * ours["flop_per_second"] / 1e12
        limit = (
            f"{executed:.0f} TFLOP/s are executed: without atomics there are nine products, as in flex_attention, not "
            "seven; how busy the tensor cores are: kernels_counters.json"
        )
        table.bar(op, "times flex_attention", flex_row["median"] / ours["median"], wanted, limit=limit)
    if flash_row := rows.get("SDPA-flash, all queries"):
        share = ours["flop_per_second"] / flash_row["flop_per_second"]
        table.bar(op, "share of the FLOP rate of SDPA-flash", share, 0.6)
