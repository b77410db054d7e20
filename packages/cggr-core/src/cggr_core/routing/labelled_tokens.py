"""A few labelled tokens of a batch that include everything a loss might treat in a special way."""

import inspect
import re
from typing import Any

import torch
from torch import Tensor

from cggr_core.routing.heads import head_rows
from cggr_core.routing.inputs import TokenInputs

IGNORED = -100
_ROWS = 2
# Settings that name one or more tokens, which a loss may treat in a special way.
_SPECIAL_TOKEN = re.compile(r"token_ids?$|token_index$")
_MODALITY_TOKEN = re.compile(r"(image|video|audio|vision|boi|eoi|media|speech)\w*_token_(id|index)$")


def few_labelled_tokens(base: Any, inputs: TokenInputs, length: int) -> tuple[dict[str, Any], Tensor]:
    """Labelled tokens ``[2, S]`` that include everything a loss might treat in a special way.

    Args:
        base: The model.
        inputs: The batch to take tokens from.
        length: Most tokens of a row.

    Returns:
        Arguments of a forward, and the labels int64 ``[2, S]``.
    """
    tokens = {name: _two_rows(tensor)[:, :length] for name, tensor in inputs.per_token.items()}
    classes = head_rows(base)
    like = next(iter(tokens.values()))
    if "input_ids" in tokens:
        tokens["input_ids"] = labels = text_alone(tokens["input_ids"], base.config)
        labels = labels.long().clone()
    else:
        labels = torch.arange(like.shape[0] * like.shape[1], device=like.device).view(like.shape[:2])
        labels = labels % classes
    length = labels.shape[1]
    # Labels besides -100 that a loss might ignore or weight: a padding token is a target like any other.
    places = ((row, place) for place in range(2, length, 2) for row in range(_ROWS))
    for (row, place), token in zip(places, _special_tokens(base.config, classes), strict=False):
        labels[row, place] = token
    # And -100 itself, more often in one row than in the other, so that a mean of row means differs.
    labels[:, 3:4] = labels[1, 5:6] = IGNORED
    if inputs.padding is not None or takes_mask(base):
        # A mask marks a labelled token as padding; without a mask, models look for padding among the tokens.
        mask = torch.ones_like(labels if inputs.padding is None else _two_rows(inputs.padding)[:, :length])
        if length > 4:
            mask[0, -1] = 0
        tokens["attention_mask"] = mask
    return tokens, labels


def _two_rows(tensor: Tensor) -> Tensor:
    return tensor[:_ROWS] if tensor.shape[0] >= _ROWS else torch.cat([tensor] * _ROWS)


def _special_tokens(config: Any, classes: int) -> list[int]:
    """Tokens named in a config, those that losses treat in a special way first."""
    text = config.get_text_config()
    named = [getattr(text, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id")]
    for owner in (text, config):
        named += [value for name, value in vars(owner).items() if _SPECIAL_TOKEN.search(name)]
    tokens = [token for value in named for token in (value if isinstance(value, list) else [value])]
    return list(dict.fromkeys(token for token in tokens if type(token) is int and 0 <= token < classes))


def text_alone(input_ids: Tensor, config: Any) -> Tensor:
    """Token ids in which placeholders of images and the like, which need their inputs, are replaced."""
    special = {
        value
        for owner in (config, config.get_text_config())
        for name, value in vars(owner).items()
        if isinstance(value, int) and _MODALITY_TOKEN.search(name)
    }
    if not special:
        return input_ids
    plain = next(token for token in range(len(special) + 1) if token not in special)
    placeholders = torch.isin(input_ids, torch.tensor(sorted(special), device=input_ids.device))
    return input_ids.masked_fill(placeholders, plain)


def takes_mask(base: Any) -> bool:
    """Whether a model's forward takes an attention mask by name."""
    return "attention_mask" in inspect.signature(base.forward).parameters
