"""What a training step on one row of 131,072 tokens would move, compute and store on each of several GPUs.

``python -m benchmarks.sequence_parallel`` (a second, no GPU). Nothing is measured: bytes and operations are counted
from the model's sizes, and seconds follow from assumed rates. Every GPU holds a share of the row and gathers each
layer's keys and values before its attention (grouped heads keep them small); their gradients are reduce-scattered back.
Kept tokens are distributed evenly: their pass starts from token ids, so any GPU can run any of them.
"""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import _record

CONTROL = "standard, checkpointed"
ELEMENT = 2
"""Bytes of a bfloat16 number."""


@dataclass(frozen=True)
class Sizes:
    """A Llama; Llama-3-8B's by default."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 128256

    @property
    def key_value_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.kv_heads * self.head_dim * ELEMENT

    @property
    def products(self) -> int:
        """Operations of one token's matrix products in one layer, forward."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * (attention + 3 * self.hidden * self.intermediate)

    @property
    def key_value_products(self) -> int:
        """Operations of one token's key and value projections in one layer, forward."""
        return 2 * self.hidden * 2 * self.kv_heads * self.head_dim

    @property
    def activations(self) -> int:
        """Bytes that one token's layer keeps for its backward pass, with fused attention."""
        inputs = 6 * self.hidden  # inputs and outputs of both norms, queries, attention's output
        return ELEMENT * (inputs + 3 * self.intermediate) + self.key_value_bytes


@dataclass(frozen=True)
class Step:
    """How much of each kind of work a step does, in forwards of all tokens.

    Attributes:
        gathers: Times that the keys and values of all tokens are gathered.
        reduced: Share of the tokens whose keys and values get a gradient from other GPUs.
        forward: Forwards of the layers.
        backward: Share of the tokens that go through the layers' backward pass.
        head: Forwards of the head, over all tokens.
        head_backward: Share of the tokens in the head's backward pass.
        kept: Share of the tokens whose layers keep all activations; with recomputation, one layer at a time does.
        inputs: Share of the tokens for which each layer keeps only its input.
    """

    gathers: float
    reduced: float
    forward: float
    backward: float
    head: float
    head_backward: float
    kept: float
    inputs: float


def steps(ratio: float, layers: int) -> dict[str, Step]:
    """The steps compared, at a keep ratio; keys and values gathered for one pass are not kept for the next."""
    r = ratio
    return {
        "standard": Step(2, 1, 1, 1, 1, 1, 1, 0),
        CONTROL: Step(2, 1, 2, 1, 1, 1, 1 / layers, 1),
        f"two passes, kv, ratio {r}": Step(2 + 1, 1, 1 + r, r, 1 + r, r, r, 1),
        f"interleaved, kv, ratio {r}": Step(2, 1, 1, r, r, r, r, 1),
        f"interleaved, detached, ratio {r}": Step(2, r, 1, r, r, r, r, 0),
    }


def account(sizes: Sizes, step: Step, *, length: int, ranks: int, rate: float, link: float) -> dict[str, Any]:
    """One GPU's part of a step.

    Args:
        sizes: Of the model.
        step: Its work.
        length: Tokens of the row.
        ranks: GPUs that share it.
        rate: Operations per second that a GPU achieves.
        link: Bytes per second that a GPU receives.

    Returns:
        ``moved`` (bytes received), ``operations``, ``seconds`` of both without overlap, ``communication`` (their share
        of the sum), ``kept`` (bytes of activations, keys and values) and ``gathered`` (bytes of one layer's gathered
        keys and values).
    """
    tokens = length / ranks
    whole = length * sizes.key_value_bytes
    moved = sizes.layers * whole * (ranks - 1) / ranks * (step.gathers + step.reduced)
    attention = 4 * sizes.heads * sizes.head_dim * length / 2  # per token, over half a row on average
    layers = step.forward * (sizes.products + attention) + step.backward * (2 * sizes.products + 2.5 * attention)
    # In kv, the other tokens' gradient ends at the key and value weights: one product.
    layers += (step.reduced - step.backward) * sizes.key_value_products
    head = 2 * sizes.hidden * sizes.vocab * (step.head + 2 * step.head_backward)
    operations = tokens * (sizes.layers * layers + head)
    kept = tokens * sizes.layers * (step.kept * sizes.activations + step.inputs * sizes.hidden * ELEMENT)
    if step.backward < 1:
        kept += tokens * sizes.layers * sizes.key_value_bytes  # the context tokens'
    computing, moving = operations / rate, moved / link
    return {
        "moved": moved,
        "operations": operations,
        "computing": computing,
        "moving": moving,
        "communication": moving / (computing + moving),
        "kept": kept,
        "gathered": whole,
    }


def main() -> None:
    """Account for every step, write the JSON and the plot, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=131_072)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.05, 0.25])
    parser.add_argument("--rate", type=float, default=5e14, help="operations per second that a GPU achieves")
    parser.add_argument("--link", type=float, default=3.5e11, help="bytes per second that a GPU receives")
    parser.add_argument("--output", type=Path, default=_record.RESULTS, help="folder of the JSON and the plot")
    _record.add_seconds(parser)
    options = parser.parse_args()
    sizes = Sizes()
    rows: dict[str, dict[str, Any]] = {}
    for ranks in options.ranks:
        for ratio in options.ratios:
            for name, step in steps(ratio, sizes.layers).items():
                found = account(sizes, step, length=options.length, ranks=ranks, rate=options.rate, link=options.link)
                seconds = found["computing"] + found["moving"]
                rows[f"{ranks} GPUs: {name}"] = _record.summary([seconds]) | {"unit": "s, counted"} | found
    for name, row in rows.items():
        print(
            f"{name:45} {row['median']:6.2f} s  moved {row['moved'] / 1e9:6.1f} GB = {row['communication']:6.1%}  "
            f"kept {row['kept'] / 1e9:6.1f} GB"
        )
    settings = asdict(sizes) | {
        "length": options.length,
        "ranks": options.ranks,
        "ratios": options.ratios,
        "rate": options.rate,
        "link": options.link,
        "seed": None,
    }
    control = f"{options.ranks[0]} GPUs: {CONTROL}"
    path = _record.write("sequence_parallel", rows, settings=settings, control=control, folder=options.output)
    _draw(rows, options.ranks[len(options.ranks) // 2]).savefig(path.with_suffix(".png"), dpi=150)


def _draw(rows: dict[str, dict[str, Any]], ranks: int) -> Figure:
    start = f"{ranks} GPUs: "
    shown = {name.removeprefix(start): row for name, row in rows.items() if name.startswith(start)}
    figure = Figure(figsize=(9, 1.2 + 0.4 * len(shown)), layout="constrained")
    seconds, memory = figure.subplots(1, 2, sharey=True)
    places = range(len(shown))
    computing = [row["computing"] for row in shown.values()]
    seconds.barh(places, computing, color="#2a6f97", height=0.6, label="computing")
    moving = [row["moving"] for row in shown.values()]
    seconds.barh(places, moving, left=computing, color="#e07a5f", height=0.6, label="moving keys and values")
    seconds.legend(frameon=False, fontsize=8)
    memory.barh(places, [row["kept"] / 1e9 for row in shown.values()], color="#2a6f97", height=0.6)
    memory.axvline(80, color="0.4", linewidth=0.8, linestyle="--")
    seconds.set_yticks(places, list(shown), fontsize=8)
    seconds.invert_yaxis()
    seconds.set_title(f"seconds a step, {ranks} GPUs, without overlap", fontsize=9, loc="left")
    memory.set_title("GB kept on each GPU (dashed: 80)", fontsize=9, loc="left")
    for axes in (seconds, memory):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
