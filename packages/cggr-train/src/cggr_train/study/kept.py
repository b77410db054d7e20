"""Which tokens an arm keeps: shares by position, by token frequency and by score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cggr_train.data import split_supervised
from cggr_train.data.batches import in_order
from cggr_train.study.arms import Arm
from cggr_train.study.context import StudyContext

BINS = 10
DRAWS = 4


@torch.no_grad()
def kept_shares(context: StudyContext, arms: list[Arm], *, weights: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Select from held-out batches as each arm would and count what is kept.

    Args:
        context: The study.
        arms: Routed arms, none of whose scores depend on its own run.
        weights: Folder of the model that scores.
        seed: Seed of the selections.

    Returns:
        For each arm the kept share in ten bins: ``position`` (tenths of the sequence, first to last), and, of equal
        counts of countable tokens, ``frequency`` (of the target token in the training text, rarest to most frequent)
        and ``score`` (lowest to highest; by the gradient norm for arms that use no score). None for a bin without
        countable tokens, such as the first tenth where it is all prompt.
    """
    from cggr_core import score, select

    train = context.settings.train
    model = context.model(seed, folder=weights).eval()
    limit = min(train.eval_sequences, 4 * train.batch_size)
    batches = in_order(context.tokens.heldout, length=train.length, batch_size=train.batch_size, limit=limit)
    text = np.where(context.tokens.train < 0, ~context.tokens.train, context.tokens.train)  # see data.supervision
    counts = torch.from_numpy(np.bincount(text, minlength=len(context.tokenizer)))
    sums = {arm.name: {name: torch.zeros(2, BINS) for name in ("position", "frequency", "score")} for arm in arms}
    for number, batch in enumerate(batches):
        rows = batch.to(context.device)
        input_ids, _ = split_supervised(rows)
        targets, countable = input_ids[:, 1:], rows[:, 1:] >= 0
        counted = countable.cpu()
        if not counted.any():
            continue
        places = torch.arange(targets.shape[1]).expand(targets.shape)
        bins = {
            "position": _bins(places, torch.ones_like(counted)),
            "frequency": _bins(counts[targets.cpu()], counted),
        }
        known: dict[tuple[str, int | None], Tensor] = {}
        for arm in arms:
            key = (arm.routing.scoring, arm.routing.depth(model.config.get_text_config().num_hidden_layers))
            if key not in known:
                known[key] = score(_statistics(context, model, key[1], input_ids), scoring=arm.routing.scoring)
            scores = known[key]
            bins["score"] = _bins(scores.cpu(), counted)
            for draw in range(DRAWS):
                mask = select(
                    scores, countable, ratio=arm.routing.ratio, selection=arm.routing.selection, seed=seed,
                    draw=number * DRAWS + draw,
                ).mask.cpu()  # fmt: skip
                for name, where in bins.items():
                    kept = torch.bincount(where[mask], minlength=BINS)
                    sums[arm.name][name] += torch.stack([kept, torch.bincount(where[counted], minlength=BINS)])
    return {
        arm: {
            name: [share if count else None for share, count in zip((kept / seen).tolist(), seen.tolist(), strict=True)]
            for name, (kept, seen) in by.items()
        }
        for arm, by in sums.items()
    }


def _statistics(context: StudyContext, model: Any, depth: int | None, input_ids: Tensor) -> Any:
    """Token statistics ``[B, S - 1]`` by the first ``depth`` layers, or by the whole model."""
    from cggr_core import create_truncated_router, token_statistics

    with torch.autocast(context.device.type, dtype=torch.bfloat16, enabled=context.bfloat16):
        if depth is None:
            logits = model(input_ids=input_ids, use_cache=False).logits
        else:
            found = create_truncated_router(model, num_layers=depth)(input_ids)
            logits = found if isinstance(found, Tensor) else found.logits
    return token_statistics(logits[:, :-1].float(), input_ids[:, 1:])


def _bins(values: Tensor, counted: Tensor) -> Tensor:
    """Bin of each value, 0 to 9, with about equal numbers of counted ones; equal values share a bin."""
    values = values.to(torch.float64)
    edges = torch.quantile(values[counted], torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1])
    return torch.bucketize(values, edges, right=True)
