"""A held-out passage, token by token: what the trained model makes of it and which tokens it would learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cggr_train.learner import Routing
from cggr_train.presets import load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIGURES = ("nll", "entropy", "confidence", "margin", "gradnorm")


@dataclass(frozen=True)
class PassageToken:
    """One token of a passage and the score of predicting it.

    The score at position t is about the token at t+1; here it is shown on that token. The first token is predicted
    by nothing: its ``score`` and figures are None.

    Attributes:
        text: The characters it stands for; empty where a character is spread over several tokens.
        position: Place in the passage, from 0.
        score: By the chosen scoring; higher is harder.
        shade: Rank of ``score`` in the passage, from 0 (lowest) to 1 (highest).
        kept: Whether the selection keeps the position that predicts it.
        weight: Its weight in the loss if kept, else 0.
        nll: Negative log-likelihood, nats.
        entropy: Of the prediction, nats.
        confidence: Probability of the likeliest token.
        margin: That minus the second likeliest.
        gradnorm: Norm of the gradient at the logits, in [0, √2].
        guess: The likeliest token.
    """

    text: str
    position: int
    score: float | None = None
    shade: float = 0.0
    kept: bool = False
    weight: float = 0.0
    nll: float = 0.0
    entropy: float = 0.0
    confidence: float = 0.0
    margin: float = 0.0
    gradnorm: float = 0.0
    guess: str = ""


@dataclass(frozen=True)
class Passage:
    """A passage and how it was scored.

    Attributes:
        tokens: In order.
        scoring: Name of the score.
        selection: Name of the strategy.
        ratio: Keep ratio achieved.
        lowest: Score of shade 0.
        highest: Score of shade 1.
    """

    tokens: list[PassageToken]
    scoring: str
    selection: str
    ratio: float
    lowest: float
    highest: float


def choose_passage(texts: Sequence[str], *, characters: int = 2000) -> str:
    """A stretch of code from the longest text: from the first definition after its first quarter.

    Args:
        texts: Held-out documents; at least one.
        characters: Length wanted.
    """
    text = max(texts, key=len)
    quarter = len(text) // 4
    starts = [found for mark in ("\ndef ", "\nclass ", "\n") if (found := text.find(mark, quarter)) >= 0]
    start = starts[0] + 1 if starts else 0
    return text[start : start + characters] or text[:characters]


@torch.no_grad()
def score_passage(
    model_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    routing: Routing,
    *,
    length: int,
    seed: int,
) -> Passage:
    """Score a text with a trained model and select from it as a training step would.

    Args:
        model_folder: Directory written by ``save_pretrained``.
        tokenizer: A fast tokenizer of that model.
        text: The passage; cut to ``length`` tokens.
        routing: Scoring, selection and ratio.
        length: Longest sequence of the model.
        seed: Seed of the selection.
    """
    from cggr_core import score, select, token_statistics

    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"][:length], encoded["offset_mapping"][:length]
    model = load_model(str(model_folder)).eval()
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
    statistics = token_statistics(logits, torch.tensor(ids[1:]))
    scores = score(statistics, scoring=routing.scoring)
    chosen = select(
        scores[None], torch.ones_like(scores, dtype=torch.bool)[None],
        ratio=routing.ratio, selection=routing.selection, seed=seed,
    )  # fmt: skip
    weights = torch.zeros_like(scores).scatter_(0, chosen.index[0], (chosen.weight * chosen.valid)[0])
    kept = chosen.mask[0]
    lowest, highest = scores.min().item(), scores.max().item()
    # by rank: a young model's scores lie so close together that shades by value would all look alike
    shades = scores.argsort(stable=True).argsort() / max(len(scores) - 1, 1)
    guesses = logits.argmax(-1).tolist()

    columns = {name: getattr(statistics, name).tolist() for name in FIGURES}
    pieces = _pieces(text, offsets)
    tokens = [PassageToken(pieces[0], 0)]
    for t in range(len(ids) - 1):
        tokens.append(
            PassageToken(
                text=pieces[t + 1],
                position=t + 1,
                score=scores[t].item(),
                shade=shades[t].item(),
                kept=bool(kept[t]),
                weight=weights[t].item(),
                guess=str(tokenizer.decode([guesses[t]])),
                **{name: values[t] for name, values in columns.items()},
            )
        )
    return Passage(tokens, routing.scoring, routing.selection, chosen.ratio.item(), lowest, highest)


def _pieces(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """Characters of each token; one that several tokens share goes to the first of them."""
    pieces, done = [], 0
    for start, end in offsets:
        pieces.append(text[max(start, done) : max(end, done)])
        done = max(done, end)
    return pieces
