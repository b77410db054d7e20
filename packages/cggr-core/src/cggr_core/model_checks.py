"""Settings and inputs of CGGRModel that are wrong or cannot go together: each is named, none is ignored."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from cggr_core.checks import (
    check_at_least,
    check_choice,
    check_draw,
    check_float,
    check_num_items,
    check_same_device,
    check_shape,
)
from cggr_core.learned_router import LearnedRouter
from cggr_core.remembered import RememberedScores
from cggr_core.scoring import SCORINGS
from cggr_core.selection import SELECTIONS, Selection

if TYPE_CHECKING:
    from cggr_core.model import CGGRModel
    from cggr_core.routing import TokenInputs

__all__ = ["SCORELESS", "check_inputs", "check_settings", "check_unused", "without_wishes"]

GRADIENT_MODES = ("exact", "kv", "detached", "sequence")
ENGINES = ("interleaved", "two_pass")
MODEL_SELECTIONS = (*SELECTIONS, "supervised")
# Selections that look at no score.
SCORELESS = ("random", "supervised")
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


def check_settings(
    *,
    router: Any,
    gradient: str,
    selection: str,
    scoring: str,
    block_size: int,
    warmup_steps: int,
    dynamic_threshold: bool,
    engine: str | None,
) -> None:
    """Raise unless the settings of a CGGRModel exist and can go together.

    What belongs to one selection alone (``num_strata``, ``min_tokens_per_sequence``, ``scoring``) is not asked about,
    so that selections can be compared with all else equal.

    Raises:
        TypeError: If the router cannot be called.
        ValueError: If a name is unknown, or a setting would not have the effect it stands for.
    """
    check_choice("gradient", gradient, GRADIENT_MODES)
    check_choice("selection", selection, MODEL_SELECTIONS)
    check_choice("scoring", scoring, SCORINGS)
    if engine is not None:
        check_choice("engine", engine, ENGINES)
        if gradient not in ("kv", "detached"):
            raise ValueError(
                f"engine={engine!r} says how gradient='kv' and 'detached' are computed, and gradient is {gradient!r}; "
                "leave engine=None"
            )
    if router is not None and not callable(router) and not isinstance(router, RememberedScores):
        raise TypeError(f"router must be callable, a LearnedRouter or RememberedScores, got {type(router).__name__}")
    _check_selection(router, selection, block_size, warmup_steps, dynamic_threshold)
    if gradient == "sequence":
        _check_sequence(selection, block_size)
    if engine == "interleaved" and router is None and selection not in SCORELESS:
        raise ValueError(
            "engine='interleaved' needs the selection before the layers: give a router "
            "(create_truncated_router(model)), selection='random' or 'supervised', or leave engine=None"
        )


def _check_selection(router: Any, selection: str, block_size: int, warmup_steps: int, dynamic_threshold: bool) -> None:
    if selection in SCORELESS:
        if router is not None:
            raise ValueError(f"a router scores tokens, and selection={selection!r} reads no score; leave router=None")
        if dynamic_threshold:
            raise ValueError(
                f"dynamic_threshold needs the confidence of scored tokens, and selection={selection!r} scores none"
            )
    if selection == "supervised":
        for name, value, nothing in (("block_size", block_size, 1), ("warmup_steps", warmup_steps, 0)):
            if value != nothing:
                raise ValueError(
                    f"{name}={value} would change which tokens are kept, and selection='supervised' keeps exactly the "
                    f"countable ones; leave {name}={nothing}"
                )
    if dynamic_threshold and isinstance(router, LearnedRouter | RememberedScores):
        raise ValueError(
            f"dynamic_threshold needs the model's confidence at every token, and {type(router).__name__} gives scores "
            "alone; use a truncated router or none"
        )


def _check_sequence(selection: str, block_size: int) -> None:
    if selection == "supervised":
        raise ValueError("selection='supervised' keeps tokens, and gradient='sequence' keeps whole sequences")
    if selection == "sequence_aware":
        raise ValueError(
            "selection='sequence_aware' keeps tokens of every sequence, and gradient='sequence' leaves sequences out; "
            "use selection='topk'"
        )
    if block_size != 1:
        raise ValueError(
            f"block_size={block_size} selects blocks of tokens, and gradient='sequence' keeps whole sequences; leave "
            "block_size=1"
        )


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
    if reference_nll is not None and config.scoring != "excess":
        raise ValueError(f"reference_nll is read by scoring='excess' only, and scoring is {config.scoring!r}")
    scored = selection is None and config.selection not in SCORELESS
    if reference_nll is None and config.scoring == "excess" and scored:
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
    if config.gradient == "sequence":
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
