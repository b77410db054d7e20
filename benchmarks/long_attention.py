"""Attention of a few kept tokens of very long rows: time and memory of forward and backward, against alternatives.

``python -m benchmarks.long_attention`` (one CUDA device, about a minute; ``--tiny`` on a CPU, to try it). One row of
32,768 and of 131,072 tokens, 32 query heads on 8 key heads of 128, bfloat16, 5% to 25% of the queries kept, gradients
of queries, keys and values. The alternatives are SDPA's flash kernel on all queries (as in a standard step), SDPA with
a dense mask of the kept queries, and compiled flex attention with their block mask. Memory is the peak above q, k, v
and the output's gradient; candidates that do not fit or do not run are listed in the settings with the reason.
"""

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import _record
from benchmarks._kernels import peak_bytes
from cggr_core import routing as routing  # registers the op
from cggr_core.backends import report, resolve

HEADS, KEY_HEADS, SIZE = 32, 8, 128
LENGTHS = (32768, 131072)
KEPT = (0.05, 0.125, 0.25)
OURS, ALL, MASK, FLEX = "routed attention", "SDPA, all queries", "SDPA, dense mask", "flex attention, compiled"
SEED = 0


def arms(length: int, share: float, device: str) -> dict[str, Callable[[], Any]]:
    """A call of forward and backward for each name, created one at a time, so that none holds another's memory."""
    generator = torch.Generator(device).manual_seed(SEED)
    kept = max(1, round(length * share))

    def leaf(count: int, heads: int) -> Tensor:
        made = torch.randn(1, count, heads, SIZE, device=device, dtype=torch.bfloat16, generator=generator)
        return made.requires_grad_()

    position = torch.rand(1, length, device=device, generator=generator).argsort(1)[:, :kept].sort(1).values

    def both(count: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        q, k, v = leaf(count, HEADS), leaf(length, KEY_HEADS), leaf(length, KEY_HEADS)
        gradient = torch.randn(q.shape, device=device, dtype=q.dtype, generator=generator)
        return lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), gradient)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return resolve("routed_attention", device)(q, k, v, position)

    def everything(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = torch.arange(length, device=device) <= position[:, :, None]
        k, v = (part.repeat_interleave(HEADS // KEY_HEADS, 2).transpose(1, 2) for part in (k, v))
        return scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=visible[:, None]).transpose(1, 2)

    made = {
        ALL: lambda: both(length, everything),
        OURS: lambda: both(kept, ours),
        MASK: lambda: both(kept, masked),
    }
    if device == "cuda":
        made[FLEX] = lambda: both(kept, _flex(position, length))
    return made


def _flex(position: Tensor, length: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def mask(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return position[b, query] >= key

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    # Compiled, since otherwise the dense mask is built first.
    blocks = torch.compile(create_block_mask)(mask, 1, None, position.shape[1], length, device=position.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2)

    return attend


def peak_of(call: Callable[[], Any], device: str) -> int:
    """Bytes above those allocated before the call; 0 if they cannot be counted."""
    call()  # compilation on first use is not counted
    return 0 if device == "cpu" else peak_bytes(call)


def main() -> None:
    """Measure length by length and share by share; the file is written after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--kept", type=float, nargs="+", default=KEPT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="short rows, to check that everything runs")
    parser.add_argument("--name", default="long_attention", help="of the result file")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the result")
    _record.add_seconds(parser)
    options = parser.parse_args()
    deadline = _record.deadline(options.seconds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and ("routed_attention", "cuda", "triton") not in [row[:3] for row in report()]:
        parser.error("cggr-kernels is not installed; its routed attention is what this measures")
    rows: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    for length in (64,) if options.tiny else options.lengths:
        for share in options.kept:
            where = f"{length} tokens, {share:g} kept"
            calls: dict[str, Callable[[], Any]] = {}
            peaks: dict[str, int] = {}
            for name, make in arms(length, share, device).items():
                if _record.is_over(deadline):
                    left_out[f"{where}: {name}"] = "time was up"
                    continue
                try:
                    calls[name] = make()
                    peaks[name] = peak_of(calls[name], device)
                except RuntimeError as error:
                    calls.pop(name, None)
                    left_out[f"{where}: {name}"] = f"{type(error).__name__}: {str(error)[:200]}"
                    gc.collect()
                    if device == "cuda":
                        torch.cuda.empty_cache()
            if ALL not in calls or OURS not in calls:
                continue
            timing = {"rounds": options.rounds, "deadline": deadline, "calls": 1}
            for name, row in _record.measure_until(calls, control=ALL, device=device, **timing).items():
                rows[f"{where}: {name}"] = row | {"peak_extra_bytes": peaks[name]}
                times, size = row["median"] * 1e3, peaks[name] / 1e9
                print(f"{where:32} {name:26} {times:9.2f} ms {row['ratio']['median']:6.2f}x {size:7.2f} GB", flush=True)
            settings = {
                "heads": HEADS, "key_heads": KEY_HEADS, "head_dim": SIZE, "batch": 1, "dtype": "bfloat16", "seed": SEED,
                "rounds": options.rounds, "left_out": left_out,
            }  # fmt: skip
            made = {"control": next(iter(rows)), "device": device, "folder": options.output}
            path = _record.write(options.name, rows, settings=settings, **made)
            _record.plot(_record.load(options.name, folder=options.output), path.with_suffix(".png"), label="seconds")
    for name, why in left_out.items():
        print(f"left out: {name}: {why}")


if __name__ == "__main__":
    main()
