"""How much of the full gradient a ``kv`` step keeps, depending on which tokens are kept and which layers route.

The cosine of the mean over batches of each variant's gradient with the mean of the full gradient, on questions and
answers of GSM8K (by themselves, or behind other questions), before training and, with ``--train``, what each variant
reaches on held-out text at the same cost:

``scattered R`` a share R of the supervised tokens, drawn independently ``stretch N, R`` the same share in whole
stretches of N neighbouring ones ``supervised`` all supervised tokens ``margin M`` these, and the M tokens before each
stretch of them: no loss, but a gradient ``lower K kv`` ``kv`` on the lowest K layers and the exact gradient above them
``upper K kv`` the reverse

Kept tokens are weighted by the inverse of their probability. A layer is given ``where(kept, h, h.detach())``, which is
what ``kv`` computes: the gradient equals the routed step's up to rounding, but its time does not, so none is reported;
``cost`` is from the table of gradient modes, in forwards of the model.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import _record
from benchmarks._frontier_data import load
from benchmarks._frontier_training import loss_on
from benchmarks._frontier_units import routed_layers
from cggr_train.data import Batches, split_supervised
from cggr_train.device import pick_device
from cggr_train.presets import load_model

SEED = 0


@dataclass(frozen=True)
class Variant:
    """Which tokens are kept, and in which layers.

    Attributes:
        ratio: Share of the supervised tokens.
        stretch: Number of neighbouring tokens kept together.
        margin: Tokens before each supervised stretch that are kept without a loss.
        layers: The layers that route, of so many, as a share of the depth.
    """

    ratio: float = 1.0
    stretch: int = 1
    margin: int = 0
    layers: tuple[float, float] = (0.0, 1.0)


def variants(ratio: float) -> dict[str, Variant]:
    """Everything that is compared."""
    return {
        "supervised": Variant(),
        f"scattered {ratio:g}": Variant(ratio),
        **{f"stretch {n}, {ratio:g}": Variant(ratio, stretch=n) for n in (16, 32, 64, 128)},
        **{f"margin {m}": Variant(margin=m) for m in (8, 16, 32, 64, 128)},
        **{f"lower {share:g} kv": Variant(layers=(0.0, share)) for share in (0.5, 0.75, 0.9)},
        **{f"upper {share:g} kv": Variant(layers=(1 - share, 1.0)) for share in (0.5, 0.75, 0.9)},
    }


def choose(variant: Variant, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The tokens of a batch that a variant keeps.

    Args:
        variant: The variant.
        labels: int64 ``[B, S]``, −100 where nothing is supervised.
        generator: On the CPU.

    Returns:
        ``kept`` bool ``[B, S]``: positions that get gradients; ``weight`` float32 ``[B, S]``: weight of each position's
        loss on the next token.
    """
    predicts = torch.zeros_like(labels, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != -100
    if variant.ratio < 1:
        rows, length = labels.shape
        # Stretches can begin anywhere, so that every token has the same probability.
        offset = torch.randint(variant.stretch, (rows, 1), generator=generator)
        block = (torch.arange(length) + offset) // variant.stretch
        draw = torch.rand(rows, length // variant.stretch + 2, generator=generator) < variant.ratio
        drawn = predicts & draw.gather(1, block).to(labels.device)
    else:
        drawn = predicts
    kept = drawn.clone()
    for step in range(1, variant.margin + 1):
        kept[:, :-step] |= drawn[:, step:]
    return kept, drawn.float() / variant.ratio


def loss_of(model: Any, rows: Tensor, variant: Variant | None, generator: torch.Generator, *, bfloat16: bool) -> Tensor:
    """Loss of a batch; without a variant, of all supervised tokens with the full gradient."""
    input_ids, labels = split_supervised(rows)
    kept, weight = choose(variant or Variant(), labels, generator)
    layers = model.model.layers
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=bfloat16):
        if variant is None:
            logits = model(input_ids=input_ids, use_cache=False).logits
        else:
            with routed_layers(layers, variant.layers, kept):
                logits = model(input_ids=input_ids, use_cache=False).logits
    predicts = labels[:, 1:] != -100
    losses = cross_entropy(logits[:, :-1][predicts].float(), labels[:, 1:][predicts], reduction="none")
    return (losses * weight[:, :-1][predicts]).sum() / predicts.sum()


def cost(variant: Variant, share: float) -> float:
    """Cost of a step in forwards of the model if the kept tokens are known, with ``share`` of all tokens kept."""
    first, last = variant.layers
    return (last - first) * (1 + 2 * share) + (1 - last + first) * 3


def mean_gradient(model: Any, batches: list[Tensor], loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Mean over batches, as one float32 vector."""
    model.zero_grad(set_to_none=True)
    for rows in batches:
        (loss(rows) / len(batches)).backward()
    found = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


def main() -> None:
    """Measure and write the result, after every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a pretrained Llama or Qwen")
    parser.add_argument("--rows", type=Path, required=True, help="as benchmarks.frontier tokenized them")
    parser.add_argument("--name")
    parser.add_argument("--results", type=Path, default=_record.RESULTS)
    parser.add_argument("--only", nargs="*", help="some of the variants")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument(
        "--train",
        type=int,
        default=0,
        help="steps with the full gradient; the others take steps of the same total cost",
    )
    parser.add_argument("--seeds", type=int, default=3, help="of the training")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--eval-sequences", type=int, default=256)
    parser.add_argument("--device", default="auto")
    _record.add_seconds(parser)
    arguments = parser.parse_args()
    deadline = _record.deadline(arguments.seconds)
    device = pick_device(arguments.device)
    bfloat16 = device.type == "cuda"
    rows = load(arguments.rows)[0]
    name = arguments.name or f"gradient_cosine_{arguments.rows.stem}"
    size = {"length": rows.train.shape[1], "batch_size": arguments.batch_size}
    stream = rows.train.flatten().numpy()
    chosen = torch.linspace(0, len(rows.test) - 1, min(arguments.eval_sequences, len(rows.test))).round().long()
    order = Batches(stream, **size, seed=SEED)
    batches = [order.get(number).to(device) for number in range(arguments.batches)]
    base: Any = load_model(str(arguments.model))
    base.to(device).eval()  # no dropout, so that both means are of the same network
    settings = {"seed": SEED, "model": arguments.model.name, **size, "batches": arguments.batches,
                "train_steps": arguments.train, "learning_rate": arguments.learning_rate}  # fmt: skip

    def loss(variant: Variant | None, generator: torch.Generator, model: Any) -> Callable[[Tensor], Tensor]:
        return lambda rows: loss_of(model, rows, variant, generator, bfloat16=bfloat16)

    def trained(variant: Variant | None, seed: int, steps: int) -> float:
        model, generator = copy.deepcopy(base).train(), torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, weight_decay=0.01)
        warmup = max(1, steps // 20)
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / warmup) * (1 - n / steps))
        own = Batches(stream, **size, seed=seed)
        for number in range(steps):
            loss(variant, generator, model)(own.get(number).to(device)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad(set_to_none=True)
        return loss_on(model, rows.test[chosen])

    wanted: dict[str, Variant | None] = {"full": None, **variants(arguments.ratio)}
    if arguments.only:
        wanted = {key: value for key, value in wanted.items() if key == "full" or key in arguments.only}
    full = mean_gradient(base, batches, loss(None, torch.Generator().manual_seed(SEED), base))
    found: dict[str, dict[str, Any]] = {}
    for key, variant in wanted.items():
        if found and _record.is_over(deadline):
            print(f"{key}: the time is over", flush=True)
            continue
        gradient = mean_gradient(base, batches, loss(variant, torch.Generator().manual_seed(SEED), base))
        shares = [
            choose(variant or Variant(), split_supervised(rows).labels, torch.Generator().manual_seed(SEED))[0]
            .float().mean().item()
            for rows in batches
        ]  # fmt: skip
        share = sum(shares) / len(shares)
        cosine = torch.nn.functional.cosine_similarity(gradient.double(), full.double(), dim=0).item()
        row: dict[str, Any] = {"median": cosine, "kept_share": share, "unit": "cosine"}
        row["cost"] = 3.0 if variant is None else cost(variant, share)
        if arguments.train:
            row["steps"] = max(1, round(arguments.train * 3 / row["cost"]))
            row["heldout_loss"] = [trained(variant, seed, row["steps"]) for seed in range(arguments.seeds)]
        found[key] = row
        reached = "".join(f" {value:.4f}" for value in row.get("heldout_loss", ()))
        print(f"{key:20} cosine {cosine:.4f}  kept {share:6.1%}  cost {row['cost']:.2f} F{reached}", flush=True)
        _record.write(name, found, settings=settings, control="full", device=device, folder=arguments.results)


if __name__ == "__main__":
    main()
