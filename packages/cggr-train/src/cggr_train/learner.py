"""Training methods for the training loop: the plain model, or the model routed by CGGR."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from cggr_core.settings import (
    KEY_VALUE_MODES,
    ROUTERS,
    SUPERVISED,
    CudaGraph,
    RoutingSettings,
    default_router_depth,
)
from cggr_train.data import split_supervised
from cggr_train.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cggr_core.experimental import RememberedScores

METHODS = ("cggr", "random", "standard")


@dataclass(frozen=True)
class Routing:
    """How tokens are chosen and what their gradient reaches; the arguments of ``CGGRModel``.

    Attributes:
        gradient: Gradient mode: ``exact``, ``kv``, ``detached`` or ``sequence``.
        ratio: Keep ratio, in (0, 1].
        selection: Which strategy chooses the kept tokens.
        scoring: Which score it uses.
        router: Source of the scores: ``full_depth``, ``truncated``, ``learned`` or ``remembered``; None means
            ``truncated`` if ``router_depth`` is given, else ``full_depth``.
        context_precision: ``fp8``, or None for the model's own precision.
        router_depth: Layers of a truncated or learned router; None takes an eighth of the model's.
        block_size: Number of neighbouring tokens chosen together.
        context_margin: Let gradients also reach this many tokens before each supervised stretch.
        ratio_warmup_steps: Steps over which the ratio goes from 1 to ``ratio``.
    """

    gradient: str = RoutingSettings.gradient
    ratio: float = RoutingSettings.min_tokens_ratio
    selection: str = RoutingSettings.selection
    scoring: str = RoutingSettings.scoring
    router_depth: int | None = None
    ratio_warmup_steps: int = RoutingSettings.warmup_steps
    router: str | None = None
    context_precision: str | None = RoutingSettings.context_precision
    block_size: int = RoutingSettings.block_size
    context_margin: int = RoutingSettings.context_margin

    @property
    def scorer(self) -> str:
        """One of :data:`cggr_core.settings.ROUTERS`: ``router``, or its default."""
        return self.router or ("full_depth" if self.router_depth is None else "truncated")

    def depth(self, num_layers: int) -> int | None:
        """Layers of a truncated or learned router over a model with ``num_layers``; None for the others."""
        if self.scorer not in ("truncated", "learned"):
            return None
        return self.router_depth or default_router_depth(num_layers)


class Learner(Protocol):
    """The interface of a method to the training loop."""

    model: PreTrainedModel
    wrapped: nn.Module
    memory: RememberedScores | None
    """Scores of earlier epochs, if the method remembers them; :meth:`loss` then needs ``example_ids``."""

    def loss(
        self,
        rows: Tensor,
        *,
        num_items: float | Tensor | None = None,
        draw: int | Tensor | None = None,
        first_row: int = 0,
        example_ids: Tensor | None = None,
    ) -> Tensor:
        """Loss of next-token prediction on the supervised tokens of ``rows`` ``[B, S]``, float32 scalar with a graph.

        It calls ``wrapped``: the model itself, or the wrapper that averages its gradients over the ranks. ``num_items``
        is the number of countable tokens to divide by, of all micro-batches of an accumulated step together; None
        divides by this batch's own. ``draw`` and ``first_row`` number the step's random choices, and the rows within
        it; ``draw`` is a tensor (0-dim int64, on the device) if the step is recorded. ``example_ids``, int64 ``[B]``,
        gives the example in each row.
        """
        ...

    def step(self) -> None:
        """Called after every optimizer step."""
        ...

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of the latest loss, ``keep_ratio`` among them: device tensors, numbers and strings."""
        ...

    @property
    def replayed(self) -> bool:
        """Whether the latest loss and its gradient come from a CUDA graph captured by the method."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's weights."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        ...


class RoutedLearner:
    """A model inside ``CGGRModel``.

    The routed passes of ``kv`` and ``detached`` run norms, rotary embeddings and gated activations in fused ops; the
    ordinary passes of the other modes do so here.

    Args:
        model: A Hugging Face causal language model.
        routing: Settings of the routing.
        seed: Seed of the selections.
        memory: For ``router="remembered"``.
        cuda_graph: Of ``CGGRModel``.

    Raises:
        InputError: If ``CGGRModel`` does not accept a setting.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        routing: Routing,
        *,
        seed: int,
        memory: RememberedScores | None = None,
        cuda_graph: CudaGraph = False,
    ) -> None:
        from cggr_core import CGGRModel

        self.model = model
        self.wrapped: nn.Module = model
        self.memory = memory
        try:
            self.routed = CGGRModel(
                model,
                router=_router(model, routing, memory),
                gradient=routing.gradient,
                min_tokens_ratio=routing.ratio,
                selection=routing.selection,
                scoring=routing.scoring,
                block_size=routing.block_size,
                warmup_steps=routing.ratio_warmup_steps,
                context_precision=routing.context_precision,
                context_margin=routing.context_margin,
                seed=seed,
                cuda_graph=cuda_graph,
            )
        except (TypeError, ValueError) as error:
            raise InputError(str(error)) from error
        self._with_fused_layers = nullcontext if routing.gradient in KEY_VALUE_MODES else _fused_layers(model)

    def loss(
        self,
        rows: Tensor,
        *,
        num_items: float | Tensor | None = None,
        draw: int | Tensor | None = None,
        first_row: int = 0,
        example_ids: Tensor | None = None,
    ) -> Tensor:
        """See :class:`Learner`."""
        input_ids, labels = split_supervised(rows)
        place: dict[str, Any] = {"draw": draw, "first_row": first_row, "example_ids": example_ids}
        try:
            with self._with_fused_layers(), self.routed.routed_forward():
                return self.wrapped(input_ids=input_ids, labels=labels, num_items=num_items, **place)
        except ValueError as error:  # a mode that this architecture does not support, or logits that are NaN
            raise InputError(str(error)) from error

    def step(self) -> None:
        """Advance the schedule of the keep ratio."""
        self.routed.step()

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of ``CGGRModel``."""
        return self.routed.metrics

    @property
    def replayed(self) -> bool:
        """See :class:`Learner`."""
        return self.routed.replayed

    def state_dict(self) -> dict[str, Any]:
        """State of the schedule and of the counter of random draws."""
        return self.routed.routing_state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state, so that the selections are those of the uninterrupted run."""
        self.routed.load_routing_state_dict(state)


class StandardLearner(RoutedLearner):
    """The standard step: every token in the loss and in the gradient.

    Uses the same fused layers and loss through the head as routed steps, so that comparisons measure routing alone; the
    values equal the model's own loss.

    Args:
        model: A Hugging Face causal language model.
        labelled: Whether some tokens are unsupervised: the head then skips them, which costs one host read per step.
        cuda_graph: Of ``CGGRModel``.
    """

    def __init__(self, model: PreTrainedModel, *, labelled: bool = False, cuda_graph: CudaGraph = False) -> None:
        routing = Routing("exact", 1.0, SUPERVISED if labelled else "random")
        super().__init__(model, routing, seed=0, cuda_graph=cuda_graph)

    def step(self) -> None:
        """Nothing to do."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Every countable token is kept."""
        countable = self.routed.metrics.get("countable_tokens", 0)
        return {"keep_ratio": 1.0, "kept_tokens": countable, "countable_tokens": countable}

    def state_dict(self) -> dict[str, Any]:
        """Nothing to remember."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def _fused_layers(model: PreTrainedModel) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which ordinary passes run the fused ops of routed passes."""
    from cggr_core.routing import fused_forwards, replaced_forwards

    forwards = fused_forwards(model.modules())
    if not any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return partial(replaced_forwards, forwards)
    # Checkpointed layers run again in the backward pass, after the end of any context: patch them permanently.
    for_good = ExitStack()
    for_good.enter_context(replaced_forwards(forwards))
    return lambda: nullcontext(for_good)


def _router(model: PreTrainedModel, routing: Routing, memory: RememberedScores | None) -> Any:
    from cggr_core import create_truncated_router
    from cggr_core.checks import check_choice
    from cggr_core.experimental import LearnedRouter

    name = check_choice("--router", routing.scorer, ROUTERS)
    if name in ("full_depth", "remembered"):
        if routing.router_depth is not None:
            raise InputError(f"--router-depth requires a truncated or learned router, but --router is {name}")
        if name == "remembered" and memory is None:
            raise InputError("--router remembered needs examples that return every epoch: use cggr train or study")
        return memory
    depth = routing.depth(model.config.get_text_config().num_hidden_layers)
    assert depth is not None  # these two routers do not change the number of layers
    return LearnedRouter(depth) if name == "learned" else create_truncated_router(model, num_layers=depth)


def build_learner(
    model: PreTrainedModel,
    method: str,
    routing: Routing,
    *,
    seed: int,
    memory: RememberedScores | None = None,
    labelled: bool = False,
    cuda_graph: CudaGraph = False,
) -> Learner:
    """The learner of a method.

    Args:
        model: A Hugging Face causal language model, already on its device.
        method: ``cggr``, ``random`` (the control at the same keep ratio) or ``standard``.
        routing: Settings of the first two; ``random`` overrides the selection and needs no router.
        seed: Seed of the selections.
        memory: Scores of earlier epochs, for ``router="remembered"``.
        labelled: For ``standard``: whether some tokens are unsupervised, see :class:`StandardLearner`.
        cuda_graph: ``"auto"`` lets a method capture its forward and backward passes as CUDA graphs if that is faster.

    Raises:
        InputError: If the method or one of its settings is unknown.
    """
    if method == "standard":
        return StandardLearner(model, labelled=labelled, cuda_graph=cuda_graph)
    if method not in METHODS:
        raise InputError(f"--method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "random":
        routing = dataclasses.replace(routing, selection="random", router=None, router_depth=None)
    remembers = method == "cggr" and routing.router == "remembered"
    return RoutedLearner(model, routing, seed=seed, memory=memory if remembers else None, cuda_graph=cuda_graph)
