"""Tokens that no batch has held yet: a model with code of others is compared on rows that hold them.

Such code may treat a token in a special way (an end of text, a placeholder, a language), and a batch without it shows
nothing of that. What runs around the layers sees whole rows in every pass; what runs inside them may not.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from cggr_core.routing import own_code
from cggr_core.routing.agreement import alternate_tokens, comparable, difference
from cggr_core.routing.architectures import MODEL_ERRORS, Architecture, default_position_ids, unwrapped
from cggr_core.routing.context_pass import LayerOutput
from cggr_core.routing.inputs import TokenInputs
from cggr_core.routing.labelled_tokens import text_alone
from cggr_core.routing.probe import Probe

# Tokens that are looked at, in batches of the given one's size; those that the model names come first.
_BATCHES = 2


@torch.no_grad()
def probe_rare_tokens(model: nn.Module, seen: Probe, inputs: TokenInputs, *, sharded: bool) -> Probe:
    """Compare the routed passes with the plain forward on rows that hold other tokens than a batch does.

    Args:
        model: The model.
        seen: What is known of it.
        inputs: A batch of token ids, which gives the rows' number and length.
        sharded: Whether all ranks must run the same number of forwards; one batch is compared then.

    Returns:
        What is known of it now. Values are read on the host.
    """
    base = unwrapped(model)
    count = base.get_input_embeddings().weight.shape[0]
    configs = [config for part in (base, *seen.architecture.configured) if (config := part.config) is not None]
    configs += [base.config.get_text_config(), getattr(base, "generation_config", None)]
    named = own_code.tokens_named(model, [config for config in configs if config is not None], count)
    for rows in _rows_of(model, seen.architecture, inputs, named, count, 1 if sharded else _BATCHES):
        found = _difference(model, seen.architecture, rows, seen.layer_output)
        if found is not None:
            culprit = None if sharded else _culprit(model, seen.architecture, inputs, named, seen.layer_output)
            which = "other tokens than the first batch" if culprit is None else f"token {culprit}"
            obstacle = (
                f"{type(base).__name__}, in code that is not transformers' own, computes different values for kept "
                f"tokens than a plain forward in rows that hold {which} ({found})"
            )
            return replace(seen, architecture=replace(seen.architecture, obstacle=obstacle))
    return seen


def _rows_of(
    model: nn.Module, architecture: Architecture, inputs: TokenInputs, named: list[int], count: int, batches: int
) -> Iterator[TokenInputs]:
    """Batches that hold each of some tokens once: the named ones, then those of the highest numbers (added last)."""
    batch, length = inputs.shape
    ids = inputs.per_token["input_ids"]
    others = set(named)
    order = [*named, *(token for token in range(count - 1, -1, -1) if token not in others)][: batches * batch * length]
    number = -(-len(order) // (batch * length)) * batch
    # Column by column from the second quarter on, so that the first tokens are in different rows and have others on
    # both sides.
    rows = ids.repeat(number // batch, 1).T.roll(-(length // 4), 0).contiguous()
    rows.view(-1)[: len(order)] = torch.tensor(order, dtype=ids.dtype, device=ids.device)
    rows = text_alone(rows.roll(length // 4, 0).T.contiguous(), unwrapped(model).config)
    for start in range(0, number, batch):
        yield _with_tokens(model, architecture, inputs, rows[start : start + batch])


def _with_tokens(model: nn.Module, architecture: Architecture, inputs: TokenInputs, ids: Tensor) -> TokenInputs:
    """The batch with other tokens, without padding, packing and whatever belongs to its own tokens."""
    per_token = {name: torch.zeros_like(tensor) for name, tensor in inputs.per_token.items()} | {"input_ids": ids}
    return replace(
        inputs,
        per_token=per_token,
        position_ids=default_position_ids(model, architecture, ids, ids, None),
        padding=None if inputs.padding is None else torch.ones_like(inputs.padding),
        segment=None,
        options={name: value for name, value in inputs.options.items() if not isinstance(value, Tensor)},
    )


def _difference(
    model: nn.Module, architecture: Architecture, rows: TokenInputs, layer_output: LayerOutput
) -> str | None:
    selection, depth = alternate_tokens(rows), len(architecture.layers)
    # What cannot be run plainly (a placeholder without its image, say) does not come up.
    with suppress(*MODEL_ERRORS), comparable(model, architecture, rows) as expected:
        try:
            for before in (0, depth):
                found = difference(
                    model, architecture, rows, selection, expected, depth=before, layer_output=layer_output
                )
                if found is not None:
                    return found
        except MODEL_ERRORS as error:
            return f"{type(error).__name__}: {error}"
    return None


def _culprit(
    model: nn.Module, architecture: Architecture, inputs: TokenInputs, named: list[int], layer_output: LayerOutput
) -> int | None:
    """The first named token that makes a difference in the batch's own first row, in the middle of it."""
    like = inputs.per_token["input_ids"]
    for token in named:
        ids = like.clone()
        ids[:, ids.shape[1] // 4] = token
        rows = _with_tokens(model, architecture, inputs, text_alone(ids, unwrapped(model).config))
        if _difference(model, architecture, rows, layer_output) is not None:
            return token
    return None
