"""Settings and inputs of CGGRModel that are wrong or cannot go together: each is named, none is ignored."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cggr_core.checks import (
    check_at_least,
    check_draw,
    check_float,
    check_num_items,
    check_same_device,
    check_shape,
)
from cggr_core.learned_router import LearnedRouter
from cggr_core.remembered import RememberedScores
from cggr_core.selection import Selection
from cggr_core.settings import RoutingSettings

if TYPE_CHECKING:
    from cggr_core.model import CGGRModel
    from cggr_core.routing import TokenInputs

__all__ = ["check_inputs", "check_router", "check_unused", "without_wishes"]

# What the wrapped model could be asked for besides its loss, and the answer that asks for nothing.
_WISHES = {
    "past_key_values": None,
    "cache": None,
    "use_cache": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "logits_to_keep": 0,
    "return_dict": True,
}


def check_router(settings: RoutingSettings, router: Any) -> None:
    """Raise unless a router can be called, and can go with the settings.

    Raises:
        TypeError: If the router cannot be called.
        ValueError: If it would not be read, or lacks what is read.
    """
    if router is not None and not callable(router) and not isinstance(router, RememberedScores):
        raise TypeError(f"router must be callable, a LearnedRouter or RememberedScores, got {type(router).__name__}")
    settings.check_router(router, gives_confidence=not isinstance(router, LearnedRouter | RememberedScores))


def check_inputs(
    config: "CGGRModel",
    batch: "TokenInputs",
    *,
    labels: Tensor,
    token_weight: Tensor | None,
    reference_nll: Tensor | None,
    num_items: Tensor | float | None,
    selection: Selection | None,
    draw: int | Tensor | None,
    first_row: int,
    example_ids: Tensor | None,
) -> None:
    """Raise unless the arguments of a training forward fit the batch and the settings.

    Raises:
        TypeError: If an argument has a wrong type or dtype.
        ValueError: If a shape or a device does not fit, or an argument is missing or would not be read.
    """
    per_token = {"labels": labels, "token_weight": token_weight, "reference_nll": reference_nll}
    for name, tensor in per_token.items():
        if tensor is not None:
            check_shape(name, tensor, batch.shape, "one value for each input token")
            check_same_device(name, tensor, "the input", batch.position_ids)
    for name, tensor in (("token_weight", token_weight), ("reference_nll", reference_nll)):
        if tensor is not None:
            check_float(name, tensor)
    check_num_items(num_items)
    check_at_least("first_row", first_row, 0)
    if draw is not None:
        check_draw(draw)
    if reference_nll is not None and config.settings.scoring != "excess":
        raise ValueError(f"reference_nll is read by scoring='excess' only, and scoring is {config.settings.scoring!r}")
    scored = selection is None and config.settings.reads_scores
    if reference_nll is None and config.settings.scoring == "excess" and scored:
        raise ValueError("scoring='excess' needs reference_nll")
    if isinstance(config.router, RememberedScores):
        if selection is None:
            config.router.check_ids(example_ids, batch.shape)
    elif example_ids is not None:
        raise ValueError("example_ids is read by a router of RememberedScores only; leave it out")
    if selection is not None:
        _check_selection_fits(config, batch, selection)


def _check_selection_fits(config: "CGGRModel", batch: "TokenInputs", selection: Selection) -> None:
    if not isinstance(selection, Selection):
        raise TypeError(
            f"selection must be a Selection, got {type(selection).__name__}; Selection.from_mask(mask) makes one of a "
            "mask"
        )
    if config.settings.gradient == "sequence":
        raise ValueError("a selection of tokens was passed, and gradient='sequence' keeps whole sequences")
    if selection.index.shape[0] != batch.shape[0] or tuple(selection.shape) != batch.shape:
        raise ValueError(
            f"selection was made for {list(selection.shape)} tokens in {selection.index.shape[0]} row(s), and "
            f"the batch has {list(batch.shape)}; select with scope='row'"
        )
    check_same_device("selection.index", selection.index, "the input", batch.position_ids)


def check_unused(why: str, **arguments: Any) -> None:
    """Raise if something was passed that only a training forward reads; the wrapped model would never see it."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: read in training with labels only, and {why}; leave it out")


def without_wishes(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a training forward less those that ask for nothing (``use_cache=False``).

    Raises:
        ValueError: If one asks for more than the loss.
    """
    for name, nothing in _WISHES.items():
        value = arguments.get(name, nothing)
        if value is not nothing and (type(value) is not type(nothing) or value != nothing):
            came = type(value).__name__ if nothing is None else repr(value)
            raise ValueError(
                f"{name}={came}: a training forward with labels returns the loss and nothing else; leave it out, or "
                "call the wrapped model"
            )
    return {name: value for name, value in arguments.items() if name not in _WISHES}
