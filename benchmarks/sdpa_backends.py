"""Time of causal attention by each kernel behind SDPA, and by the op ``routed_attention``, on a CUDA device.

``forward`` is the work of passes over all tokens, ``forward + backward`` that of a standard step. The op gets all
tokens as queries, or some of them at random, as the other tokens of an interleaved pass. ``filled up`` is cuDNN on
whole rows, into which these queries are copied. Every row is written as soon as it is measured.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import _record
from benchmarks._kernels import SEED, Table
from cggr_kernels import routed_attention

HEADS = {64: (32, 8), 128: (32, 8)}
SHAPES = ((6, 8192, 64), (8, 2048, 64), (2, 8192, 128), (2, 4096, 64), (4, 2048, 128))
KERNELS = {"sdpa, flash": SDPBackend.FLASH_ATTENTION, "sdpa, cudnn": SDPBackend.CUDNN_ATTENTION}
CONTROL = "sdpa, by default"
QUERIES = (0.75, 0.9)


def candidates(batch: int, length: int, size: int, device: str, dtype: torch.dtype) -> dict[str, dict[str, Callable]]:
    """Calls by pass and name."""
    torch.manual_seed(SEED)
    heads, key_heads = HEADS[size]

    # Laid out as projections return them: the heads of a token next to each other.
    def rows(count: int) -> Tensor:
        return torch.randn(batch, length, count, size, device=device, dtype=dtype, requires_grad=True)

    q, k, v = rows(heads), rows(key_heads), rows(key_heads)
    cotangent = torch.randn_like(q)
    everywhere = torch.arange(length, device=device).expand(batch, length).contiguous()

    def sdpa(kernel: SDPBackend | None) -> Tensor:
        arguments = (part.transpose(1, 2) for part in (q, k, v))
        if kernel is None:
            return scaled_dot_product_attention(*arguments, is_causal=True, enable_gqa=True).transpose(1, 2)
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(*arguments, is_causal=True, enable_gqa=True).transpose(1, 2)

    def filled_up(few: Tensor, at: Tensor) -> Tensor:
        whole = few.new_empty(batch * length, heads * size).index_copy_(0, at, few.flatten(2).flatten(0, 1))
        arguments = (part.transpose(1, 2) for part in (whole.view(q.shape), k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            output = scaled_dot_product_attention(*arguments, is_causal=True, enable_gqa=True)
        return output.transpose(1, 2).reshape(whole.shape).index_select(0, at)

    outputs: dict[str, Callable[[], Tensor]] = {CONTROL: lambda: sdpa(None)}
    outputs |= {name: (lambda kernel=kernel: sdpa(kernel)) for name, kernel in KERNELS.items()}
    outputs["cggr, routed_attention"] = lambda: routed_attention(q, k, v, everywhere)

    def forward(output: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(output)

    def both(output: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(output(), (q, k, v), cotangent)

    alone = {name: forward(output) for name, output in outputs.items()}
    for share in QUERIES:
        chosen = torch.rand(batch, length, device=device).topk(int(share * length), dim=1).indices.sort(dim=1).values
        at = (chosen + torch.arange(0, batch * length, length, device=device)[:, None]).flatten()
        few = q.detach().flatten(0, 1).index_select(0, at).view(batch, -1, heads, size)
        alone[f"cggr, routed_attention, {share} of the queries"] = forward(
            lambda few=few, chosen=chosen: routed_attention(few, k, v, chosen)
        )
        alone[f"filled up, {share} of the queries"] = forward(lambda few=few, at=at: filled_up(few, at))
    return {"forward": alone, "forward + backward": {name: both(output) for name, output in outputs.items()}}


def main() -> None:
    """Time, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu tries the control without timing")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the result")
    _record.add_seconds(parser)
    options = parser.parse_args()
    until = _record.deadline(options.seconds)
    if options.device == "cpu":
        for calls in candidates(1, 16, 64, "cpu", torch.float32).values():
            for name, call in calls.items():
                if name == CONTROL:
                    call()
        return
    table = Table(options.repeats)
    for batch, length, size in SHAPES:
        for name, calls in candidates(batch, length, size, "cuda", torch.bfloat16).items():
            if table.rows and _record.is_over(until):
                return
            heads, key_heads = HEADS[size]
            op = f"B{batch} S{length} D{size} H{heads}/{key_heads}, {name}"
            products = 2.0 if name == "forward" else 7.0  # of 2 * S * S / 2 * D each
            flop = products * batch * heads * length**2 * size

            def rate(row: str, median: float, flop: float = flop) -> float:
                return flop * next((share for share in QUERIES if str(share) in row), 1.0) / median

            table.measure(op, calls, CONTROL, flop_per_second=rate)
            settings = {"seed": SEED, "repeats": options.repeats, "dtype": "bfloat16", "queries": QUERIES}
            first = next(iter(table.rows))
            _record.write("sdpa_backends", table.rows, settings=settings, control=first, device="cuda",
                          folder=options.output)  # fmt: skip


if __name__ == "__main__":
    main()
