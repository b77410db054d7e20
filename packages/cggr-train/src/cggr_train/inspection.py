"""``cggr inspect``: a passage token by token, with every score, and what every strategy would keep by each of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_core import settings
from cggr_train.device import pick_device
from cggr_train.errors import InputError
from cggr_train.option_checks import check_number, check_seed
from cggr_train.presets import load_model
from cggr_train.tokenizer import check_vocabulary, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIGURES = ("nll", "entropy", "confidence", "margin", "gradnorm")
SCORINGS = tuple(name for name in settings.SCORINGS if name != "excess")
STRATEGIES = settings.SELECTIONS
PATH_LIKE = re.compile(r"\S*(/\S*|\.[A-Za-z0-9]{1,6})")
"""One word with a slash or something like a suffix."""


@dataclass(frozen=True)
class Inspection:
    """A passage as a model reads it; the first token is not predicted and has no figures.

    The score at position t is about the token at t+1; here all values belong to that token.

    Attributes:
        model: The model's folder.
        tokens: Characters of each token; empty if several tokens share a character.
        guesses: The most likely token at each position, from the second token on.
        figures: ``nll``, ``entropy`` (nats), ``confidence``, ``margin``, ``gradnorm`` of each token from the second on.
        scores: By scoring, of each token from the second on; higher is more worth learning from.
        ranks: Rank of each score in the passage, from 0 (lowest) to 1 (highest).
        weights: By scoring and strategy, the weight in the loss of each token from the second on; 0 if not kept.
        ratio: Requested keep ratio.
        router_depth: Layers that scored, None for all.
        left_out: Tokens of the text beyond the passage.
    """

    model: str
    tokens: list[str]
    guesses: list[str]
    figures: dict[str, list[float]]
    scores: dict[str, list[float]]
    ranks: dict[str, list[float]]
    weights: dict[str, dict[str, list[float]]]
    ratio: float
    router_depth: int | None
    left_out: int = 0


def read_passage(text: str) -> str:
    """The passage: ``text`` itself, or the contents of the file of that name.

    Raises:
        InputError: If it is empty, the file cannot be read as UTF-8, or it looks like the path of a missing file.
    """
    path = Path(text)
    try:
        is_file, is_folder = path.is_file(), path.is_dir() and bool(text)
    except (OSError, ValueError):  # not a valid path
        is_file = is_folder = False
    if is_folder:
        raise InputError(f"--text {text} is a directory; give a text file in it")
    if is_file:
        try:
            text = path.read_text(encoding="utf-8-sig")  # without a byte order mark
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"the text file {path} cannot be read: {error}") from error
    elif PATH_LIKE.fullmatch(text):
        raise InputError(f"--text {text} looks like a path, but no such file exists; a passage has several words")
    if not text.strip():
        raise InputError(
            f"--text {path if is_file else repr(text)} is empty; give a passage or the path of a text file"
        )
    return text


@torch.no_grad()
def inspect_text(
    model: str,
    text: str,
    *,
    tokenizer: str | None = None,
    reference: str | None = None,
    ratio: float = settings.RoutingSettings.min_tokens_ratio,
    router_depth: int | None = None,
    length: int = 1024,
    seed: int = 0,
    device: str = "cpu",
) -> Inspection:
    """Score a passage and select from it as training steps would.

    Args:
        model: Directory written by ``save_pretrained``.
        text: The passage.
        tokenizer: Directory of its tokenizer; None is the model's own.
        reference: Directory of a reference model; adds the score ``excess``.
        ratio: Keep ratio in (0, 1].
        router_depth: Score with this many layers; None for all.
        length: Maximum number of tokens, at most the model's maximum length; longer passages are truncated.
        seed: Seed of the selections.
        device: As for ``cggr train``.

    Raises:
        InputError: If an argument is invalid.
    """
    _check(ratio, router_depth, length, seed)
    place = pick_device(device)
    net = load_model(model).to(place).eval()  # pyright: ignore[reportArgumentType]
    own = load_tokenizer(tokenizer or model)
    embedding: Any = net.get_input_embeddings()
    check_vocabulary(own, embedding.weight.shape[0], name=f"the tokenizer in {tokenizer or model}")
    length = min(length, getattr(net.config, "max_position_embeddings", None) or length)
    ids, pieces, left_out = _encode(own, text, length)
    try:
        logits = _logits(net, ids.to(place), router_depth)
        reference_nll = None
        if reference is not None:
            other = load_model(reference).to(place).eval()  # pyright: ignore[reportArgumentType]
            rows: Any = other.get_input_embeddings()
            check_vocabulary(own, rows.weight.shape[0], name=f"the tokenizer in {tokenizer or model}")
            reference_nll = _statistics(_logits(other, ids.to(place), None), ids).nll
        found = _inspection(model, own, ids, pieces, logits, reference_nll, ratio, router_depth, seed)
    except ValueError as error:
        raise InputError(str(error)) from error
    return dataclasses.replace(found, left_out=left_out)


def _check(ratio: float, router_depth: int | None, length: int, seed: int) -> None:
    from cggr_core.checks import check_ratio

    try:
        check_ratio("--ratio", ratio)
    except ValueError as error:
        raise InputError(str(error)) from error
    check_number("--length", length, least=2)
    if router_depth is not None:
        check_number("--router-depth", router_depth, least=1)
    check_seed(seed)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> tuple[Tensor, list[str], int]:
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"][:length], encoded["offset_mapping"][:length]
    if len(ids) < 2:
        raise InputError(f"the passage must have at least 2 tokens, got {len(ids)}")
    return torch.tensor([ids]), _token_texts(text, offsets), len(encoded["input_ids"]) - len(ids)


def _token_texts(text: str, offsets: Sequence[tuple[int, int]]) -> list[str]:
    """Characters of each token; one that several tokens share goes to the first of them."""
    pieces, done = [], 0
    for start, end in offsets:
        pieces.append(text[max(start, done) : max(end, done)])
        done = max(done, end)
    return pieces


def _logits(model: Any, input_ids: Tensor, router_depth: int | None) -> Tensor:
    from cggr_core import create_truncated_router

    if router_depth is None:
        return model(input_ids=input_ids, use_cache=False).logits
    found = create_truncated_router(model, num_layers=router_depth)(input_ids)
    return found if isinstance(found, Tensor) else found.logits


def _statistics(logits: Tensor, input_ids: Tensor) -> Any:
    from cggr_core import token_statistics

    return token_statistics(logits[0, :-1].float(), input_ids[0, 1:].to(logits.device))


def _inspection(
    model: str,
    tokenizer: PreTrainedTokenizerBase,
    ids: Tensor,
    pieces: list[str],
    logits: Tensor,
    reference_nll: Tensor | None,
    ratio: float,
    router_depth: int | None,
    seed: int,
) -> Inspection:
    from cggr_core import score, select

    statistics = _statistics(logits, ids)
    scorings = (*SCORINGS, "excess") if reference_nll is not None else SCORINGS
    scores = {
        name: score(statistics, scoring=name, reference_nll=reference_nll if name == "excess" else None)
        for name in scorings
    }
    countable = torch.ones(1, ids.shape[1] - 1, dtype=torch.bool, device=logits.device)
    weights: dict[str, dict[str, list[float]]] = {}
    for name, values in scores.items():
        weights[name] = {}
        for strategy in STRATEGIES:
            chosen = select(values[None], countable, ratio=ratio, selection=strategy, seed=seed)
            spread = torch.zeros_like(values).scatter_(0, chosen.index[0], (chosen.weight * chosen.valid)[0])
            weights[name][strategy] = spread.tolist()
    last = max(ids.shape[1] - 2, 1)
    return Inspection(
        model=model,
        tokens=pieces,
        guesses=[str(tokenizer.decode([guess])) for guess in logits[0, :-1].argmax(-1).tolist()],
        figures={name: getattr(statistics, name).tolist() for name in FIGURES},
        scores={name: values.tolist() for name, values in scores.items()},
        # by rank: scores of a barely trained model are so close together that shades by value would look the same
        ranks={name: (values.argsort(stable=True).argsort() / last).tolist() for name, values in scores.items()},
        weights=weights,
        ratio=ratio,
        router_depth=router_depth,
    )
