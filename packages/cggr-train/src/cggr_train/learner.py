"""What the training loop trains: the plain model, or the model with its gradient routed by CGGR."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from cggr_train.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHODS = ("cggr", "random", "standard")


@dataclass(frozen=True)
class Routing:
    """How tokens are chosen and what their gradient reaches; the arguments of ``CGGRModel``.

    Attributes:
        gradient: Gradient mode: ``exact``, ``kv``, ``detached`` or ``sequence``.
        ratio: Keep ratio, in (0, 1].
        selection: Which strategy chooses the kept tokens.
        scoring: Which score it goes by.
        router_depth: Layers of the truncated router; None scores with the full model.
        ratio_warmup_steps: Steps over which the ratio goes from 1 to ``ratio``.
    """

    gradient: str = "kv"
    ratio: float = 0.25
    selection: str = "stratified"
    scoring: str = "gradnorm"
    router_depth: int | None = None
    ratio_warmup_steps: int = 0


class Learner(Protocol):
    """The side of a method that the training loop sees."""

    model: PreTrainedModel
    wrapped: nn.Module

    def loss(
        self, input_ids: Tensor, *, num_items: float | None = None, draw: int | None = None, first_row: int = 0
    ) -> Tensor:
        """Loss of next-token prediction on ``input_ids`` ``[B, S]``, float32 scalar with a graph.

        It goes through ``wrapped``: the model itself, or what averages its gradients over the ranks. ``num_items`` is
        the number of countable tokens to divide by, of all micro-batches of an accumulated step together; None divides
        by this batch's own. ``draw`` and ``first_row`` number the step's random choices, and the rows within it.
        """
        ...

    def step(self) -> None:
        """Called after every optimizer step."""
        ...

    @property
    def metrics(self) -> dict[str, Any]:
        """Of the latest loss: tensors on the device, numbers and strings, among them ``keep_ratio``."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's weights."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        ...


class StandardLearner:
    """Ordinary Hugging Face training: every token in the loss and in the gradient."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.wrapped: nn.Module = model
        self._countable = 0

    def loss(
        self, input_ids: Tensor, *, num_items: float | None = None, draw: int | None = None, first_row: int = 0
    ) -> Tensor:
        """See :class:`Learner`."""
        self._countable = input_ids.shape[0] * (input_ids.shape[1] - 1)
        extra = {} if num_items is None else {"num_items_in_batch": num_items}
        return self.wrapped(input_ids=input_ids, labels=input_ids, use_cache=False, **extra).loss

    def step(self) -> None:
        """Nothing to do."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Every countable token is kept."""
        return {"keep_ratio": 1.0, "kept_tokens": self._countable, "countable_tokens": self._countable}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class RoutedLearner:
    """A model inside ``CGGRModel``.

    Args:
        model: A Hugging Face causal language model.
        routing: Settings of the routing.
        seed: Seed of the selections.

    Raises:
        InputError: If a setting is not one that ``CGGRModel`` takes.
    """

    def __init__(self, model: PreTrainedModel, routing: Routing, *, seed: int) -> None:
        from cggr_core import CGGRModel, create_truncated_router

        self.model = model
        self.wrapped: nn.Module = model
        try:
            router = None
            if routing.router_depth is not None and routing.selection != "random":
                router = create_truncated_router(model, num_layers=routing.router_depth)
            self.routed = CGGRModel(
                model,
                router=router,
                gradient=routing.gradient,
                min_tokens_ratio=routing.ratio,
                selection=routing.selection,
                scoring=routing.scoring,
                warmup_steps=routing.ratio_warmup_steps,
                seed=seed,
            )
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error

    def loss(
        self, input_ids: Tensor, *, num_items: float | None = None, draw: int | None = None, first_row: int = 0
    ) -> Tensor:
        """See :class:`Learner`."""
        place = {"draw": draw, "first_row": first_row}
        try:
            with self.routed.in_place():
                return self.wrapped(input_ids=input_ids, labels=input_ids, num_items=num_items, **place)
        except ValueError as error:  # a mode that this architecture cannot have, or logits that are NaN
            raise InputError(str(error)) from error

    def step(self) -> None:
        """Move the schedule of the keep ratio."""
        self.routed.step()

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of ``CGGRModel``."""
        return self.routed.metrics

    def state_dict(self) -> dict[str, Any]:
        """State of the schedule and of the selections' draw counter."""
        return self.routed.routing_state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Make the same selections that the uninterrupted run would have made."""
        self.routed.load_routing_state_dict(state)


def build_learner(model: PreTrainedModel, method: str, routing: Routing, *, seed: int) -> Learner:
    """The learner of a method.

    Args:
        model: A Hugging Face causal language model, already on its device.
        method: ``cggr``, ``random`` (the control at the same keep ratio) or ``standard``.
        routing: Settings of the first two; ``random`` overrides the selection.
        seed: Seed of the selections.

    Raises:
        InputError: If the method or a setting of it is unknown.
    """
    if method == "standard":
        return StandardLearner(model)
    if method not in METHODS:
        raise InputError(f"--method is {method!r}: give one of {', '.join(METHODS)}")
    if method == "random":
        routing = dataclasses.replace(routing, selection="random")
    return RoutedLearner(model, routing, seed=seed)
