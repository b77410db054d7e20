"""The arguments of a training forward, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_core.checks import values_are_free
from cggr_core.coefficients import divisor
from cggr_core.selection import Selection
from cggr_core.settings import RoutingSettings
from cggr_core.step.checks import check_step_arguments
from cggr_core.targets import Targets, align_labels

if TYPE_CHECKING:
    from cggr_core.routing import Engine, TokenInputs


@dataclass(frozen=True)
class StepBatch:
    """One batch of a training step; see :meth:`cggr_core.CGGRModel.forward` for what each argument means.

    Attributes:
        arguments: Of the wrapped model's forward.
        tokens: The same, explicit for every token.
        targets: What the logits at each position predict.
        token_weight: ``[B, S]`` or ``None``.
        reference_nll: ``[B, S]`` or ``None``.
        num_items: Countable tokens that the loss is divided by; ``None`` for the batch's own.
        selection: Kept tokens chosen by the caller, or ``None``.
        draw: Number of the random draw; ``None`` counts up.
        first_row: Number of the first row among the rows of that draw.
        example_ids: int64 ``[B]`` on the CPU, or ``None``.
        slots: Slots per row if the selection keeps the supervised tokens; ``None`` to count them.
    """

    arguments: dict[str, Any]
    tokens: TokenInputs
    targets: Targets
    token_weight: Tensor | None = None
    reference_nll: Tensor | None = None
    num_items: Tensor | float | None = None
    selection: Selection | None = None
    draw: int | Tensor | None = None
    first_row: int | Tensor = 0
    example_ids: Tensor | None = None
    slots: int | None = None

    @classmethod
    def checked(
        cls,
        settings: RoutingSettings,
        engine: Engine,
        *,
        arguments: dict[str, Any],
        labels: Tensor,
        slots: int | None,
        **given: Any,
    ) -> StepBatch:
        """Check the arguments against each other and the settings, and build the batch.

        Args:
            settings: Of the step.
            engine: The passes over the model.
            arguments: Of the wrapped model's forward.
            labels: int64 ``[B, S]``, as the wrapped model takes them.
            slots: Attribute of the batch.
            **given: The other attributes.

        Raises:
            TypeError: If an argument has a wrong type or dtype.
            ValueError: If a shape, a device or (on CPU) a label does not match, an argument is missing or would be
                ignored, or the model cannot be routed or has another loss.
        """
        apart = engine.taken_apart(arguments, num_items=given.get("num_items"), ignore_index=settings.ignore_index)
        arguments, given["num_items"] = apart.rest, apart.num_items
        tokens = engine.inputs(**arguments)
        every_labels = {"labels": labels, "shift_labels": apart.shift_labels}
        check_step_arguments(settings, tokens.shape, tokens.position_ids, every_labels, **given)
        # The first batch shows how the model aligns its labels.
        engine.prepare(tokens, routing=settings.routes_keys_and_values, own_loss=True)
        if labels.dtype == torch.int64:  # else refused below
            engine.check_own_loss(tokens, labels, ignore_index=settings.ignore_index)
        if "num_items_in_batch" in apart.for_own_loss:
            engine.check_reads("num_items_in_batch", tokens)
        if apart.shift_labels is not None:
            engine.check_reads("shift_labels", tokens)
        elif tokens.padding is not None and not engine.architecture.counts_padding:
            labels = labels.masked_fill(tokens.padding == 0, settings.ignore_index)
        targets = align_labels(
            labels if apart.shift_labels is None else apart.shift_labels,
            shifted=engine.architecture.shifted and apart.shift_labels is None,
            vocab_size=engine.vocab_size,
            ignore_index=settings.ignore_index,
        )
        if values_are_free(labels):
            divisor(given["num_items"], targets.countable)  # raises before the step does anything
        return cls(arguments, tokens, targets, slots=slots, **given)

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, S)``."""
        return self.tokens.shape

    @property
    def countable(self) -> Tensor:
        """Bool ``[B, S]``; labels are aligned at the first access, which a step does after its first pass."""
        return self.targets.countable

    @property
    def embeddable(self) -> Tensor:
        """The targets int64 ``[B, S]``, with an arbitrary token at uncountable positions."""
        return torch.where(self.countable, self.targets.tokens, 0)

    @property
    def divisor(self) -> Tensor | float:
        """What the loss is divided by."""
        return divisor(self.num_items, self.countable)

    def rows(self, index: Tensor) -> dict[str, Any]:
        """The arguments for only the rows ``index`` ``[R]``."""
        return {name: self._of_rows(name, value, index) for name, value in self.arguments.items()}

    def _of_rows(self, name: str, value: Any, index: Tensor) -> Any:
        place = 1 if name == "position_ids" and isinstance(value, Tensor) and value.dim() == 3 else 0
        if not isinstance(value, Tensor) or value.dim() <= place or value.shape[place] != self.shape[0]:
            return value
        return value.index_select(place, index)
