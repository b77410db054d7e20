"""Checks of the arguments of a training forward: each error names its argument, and none is ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cggr_core.checks import (
    check_float,
    check_num_items,
    check_number,
    check_same_device,
    check_shape,
)
from cggr_core.selection import Selection
from cggr_core.settings import RoutingSettings

__all__ = [
    "check_no_transform",
    "check_step_arguments",
    "check_token_ids",
    "check_unused",
    "drop_inert_arguments",
]

# Outputs that the wrapped model can be asked for besides its loss, and the value that asks for none.
_INERT = {
    "past_key_values": None,
    "cache": None,
    "use_cache": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "logits_to_keep": 0,
    "return_dict": True,
}


def check_step_arguments(
    settings: RoutingSettings,
    shape: tuple[int, int],
    like: Tensor,
    labels: Mapping[str, Tensor | None],
    *,
    token_weight: Tensor | None,
    reference_nll: Tensor | None,
    num_items: Tensor | float | None,
    selection: Selection | None,
    draw: int | Tensor | None,
    first_row: int | Tensor,
    example_ids: Tensor | None,
) -> None:
    """Raise unless the arguments of a training forward match the batch and the settings.

    Args:
        settings: Of the step.
        shape: ``(B, S)``.
        like: A tensor on the device of the batch.
        labels: By the name of the argument.
        token_weight: See :meth:`cggr_core.CGGRModel.forward` for these.
        reference_nll: The same.
        num_items: The same.
        selection: The same.
        draw: The same.
        first_row: The same.
        example_ids: The same; checked by the router that reads them.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape or a device does not match, or an argument is missing or would be ignored.
    """
    per_token = {**labels, "token_weight": token_weight, "reference_nll": reference_nll}
    for name, tensor in per_token.items():
        if tensor is not None:
            check_shape(name, tensor, shape, "one value for each input token")
            check_same_device(name, tensor, "the input", like)
    for name, tensor in (("token_weight", token_weight), ("reference_nll", reference_nll)):
        if tensor is not None:
            check_float(name, tensor)
    check_num_items(num_items)
    check_number("first_row", first_row, 0)
    if draw is not None:
        check_number("draw", draw)
    if reference_nll is not None and settings.scoring != "excess":
        raise ValueError(f"reference_nll is used only by scoring='excess', but scoring is {settings.scoring!r}")
    scored = selection is None and settings.reads_scores
    if reference_nll is None and settings.scoring == "excess" and scored:
        raise ValueError(
            "scoring='excess' needs reference_nll, a reference model's nll of each token; pass it with the batch"
        )
    if selection is not None:
        _check_selection_fits(settings, shape, like, selection)


def _check_selection_fits(
    settings: RoutingSettings, shape: tuple[int, int], like: Tensor, selection: Selection
) -> None:
    if not isinstance(selection, Selection):
        raise TypeError(
            f"selection must be a Selection, got {type(selection).__name__}; Selection.from_mask(mask) creates one "
            "from a mask"
        )
    if settings.gradient == "sequence":
        raise ValueError(
            "gradient='sequence' keeps whole sequences, but a selection of tokens was passed; leave it out"
        )
    if selection.index.shape[0] != shape[0] or tuple(selection.shape) != shape:
        raise ValueError(
            f"selection was made for {list(selection.shape)} tokens in {selection.index.shape[0]} row(s), but "
            f"the batch has {list(shape)}; select with scope='row'"
        )
    check_same_device("selection.index", selection.index, "the input", like)


def check_unused(why: str, **arguments: Any) -> None:
    """Raise if an argument was passed that only a training forward reads, since the wrapped model would ignore it."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: used only in training with labels, and {why}; leave it out")


def drop_inert_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a training forward without those that ask for nothing (``use_cache=False``).

    Raises:
        ValueError: If one asks for more than the loss.
    """
    for name, nothing in _INERT.items():
        value = arguments.get(name, nothing)
        if value is not nothing and (type(value) is not type(nothing) or value != nothing):
            came = type(value).__name__ if nothing is None else repr(value)
            raise ValueError(
                f"{name}={came}: a training forward with labels returns only the loss; leave it out, or call the "
                "wrapped model"
            )
    return {name: value for name, value in arguments.items() if name not in _INERT}


def check_no_transform() -> None:
    """Raise inside a transform of ``torch.func``, which bypasses the hooks with which a step stops gradients.

    Raises:
        RuntimeError: If ``grad``, ``vmap``, ``jvp`` or another transform is running.
    """
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "a CGGRModel does not train inside a transform of torch.func (grad, vjp, vmap, jvp); call it outside, and "
            "take gradients with loss.backward() or torch.autograd.grad"
        )


def check_token_ids(input_ids: Any, rows: int) -> None:
    """Raise if token ids are outside the model's input embeddings; called where a lookup has failed.

    Args:
        input_ids: int64 ``[B, S]``, or ``None``.
        rows: Of the embeddings.

    Raises:
        ValueError: If some are.
    """
    if not isinstance(input_ids, Tensor):
        return
    outside = input_ids[(input_ids < 0) | (input_ids >= rows)]
    if outside.numel():
        raise ValueError(
            f"input_ids holds {outside.numel()} value(s) outside the model's {rows} embeddings (the first is "
            f"{int(outside[0])}); use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))"
        )
