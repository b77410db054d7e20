"""The arguments of a model's forward that only its loss reads, and which of them a routed step supports."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from cggr_core.routing.architectures import unwrapped

# Arguments that losses are known to read, besides those that the model's loss function declares and those named after
# labels.
_LOSS_ARGUMENTS = frozenset({"num_items_in_batch", "ignore_index", "reduction", "class_weights"})
_NOT_FOR_LOSS_ALONE = frozenset(
    {"labels", "vocab_size", "input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids"}
)


def loss_arguments(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward that only the model's loss would read: known names, and those of its loss function.

    Args:
        model: The model.
        arguments: Of its forward.
    """
    rest = {name: value for name, value in arguments.items() if name not in _NOT_FOR_LOSS_ALONE}
    if not rest:  # as in most steps: inspecting the loss function costs more
        return rest
    of_loss = _LOSS_ARGUMENTS | _parameters(getattr(unwrapped(model), "loss_function", None))
    return {name: value for name, value in rest.items() if name in of_loss or "label" in name}


@dataclass(frozen=True)
class LossArguments:
    """A forward's arguments for its loss, separated from those for the passes over the model.

    Attributes:
        rest: The forward's other arguments; the passes get no labels.
        num_items: Countable tokens of the whole optimiser step, which transformers calls ``num_items_in_batch``.
        shift_labels: Labels int64 ``[B, S]`` that are already shifted to their predictors, or ``None``.
        for_own_loss: Names of the arguments that the model's own loss would have read.
    """

    rest: dict[str, Any]
    num_items: Tensor | float | None = None
    shift_labels: Tensor | None = None
    for_own_loss: frozenset[str] = frozenset()


def taken_apart(
    model: nn.Module, arguments: dict[str, Any], *, num_items: Tensor | float | None, ignore_index: int
) -> LossArguments:
    """Separate the arguments of a forward that only the model's loss reads from the rest.

    Args:
        model: The model.
        arguments: Of its forward.
        num_items: Countable tokens of the whole optimiser step, or ``None``.
        ignore_index: Of the labels.

    Raises:
        ValueError: If an argument would change the loss in a way that a routed step does not support, or ``num_items``
            is given under both names.
        TypeError: If ``shift_labels`` is not a tensor.
    """
    given = loss_arguments(model, arguments)
    if not given:
        return LossArguments(arguments, num_items)
    rest, names = {name: value for name, value in arguments.items() if name not in given}, frozenset(given)
    shift_labels = given.pop("shift_labels", None)
    if shift_labels is not None and not isinstance(shift_labels, Tensor):
        raise TypeError(f"shift_labels must be a tensor, got {type(shift_labels).__name__}")
    for name in sorted(given):
        value = given[name]
        if name == "num_items_in_batch":
            if num_items is not None:
                raise ValueError("num_items and num_items_in_batch are the same number; give only one of them")
            num_items = value
        elif name == "ignore_index":
            if value != ignore_index:
                raise ValueError(
                    f"ignore_index={value}: this model was created with ignore_index={ignore_index}; create it with "
                    f"CGGRModel(model, ignore_index={value})"
                )
        else:
            raise ValueError(
                f"{name} is an argument of the model's own loss, but the loss of a routed step is cross-entropy with "
                "token_weight; leave it out, or build your loss from the model's logits"
            )
    return LossArguments(rest, num_items, shift_labels, names)


def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters) if callable(function) else frozenset()
