"""Adapters that give every accepted kind of router the protocol that a step expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cggr_core.routers.truncated import TruncatedRouter, router_statistics
from cggr_core.step.batch import StepBatch
from cggr_core.step.router import Observation, Router, ScoreRequest, Scores
from cggr_core.stopwatch import Stopwatch

if TYPE_CHECKING:
    from cggr_core.routing import Engine


def as_router(router: Any, engine: Engine) -> Router:
    """Adapt the passed router to the protocol.

    Args:
        router: ``None``, a :class:`TruncatedRouter`, a :class:`~cggr_core.step.Router`, or a callable that maps the
            model's inputs to logits.
        engine: The passes over the model.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it does not suit the model.
    """
    from cggr_core.routing import unwrapped

    if router is None:
        return FullDepthRouter(engine.depth)
    if isinstance(router, TruncatedRouter) and unwrapped(router.model) is unwrapped(engine.model):
        return OwnLayersRouter(router)
    if isinstance(router, Router):
        router.attach(layers=engine.depth, hidden_size=engine.hidden_size, embedding_size=engine.embedding_size)
        return router
    if callable(router):
        return CallableRouter(router)
    raise TypeError(
        f"router must be callable or have the methods of cggr_core.step.Router, got {router!r} of type "
        f"{type(router).__name__}; create_truncated_router(model) makes one"
    )


class _StatelessRouter:
    """A router that neither learns nor remembers.

    Attributes:
        recordable: Whether it only runs the trained model, so that its steps can be recorded.
    """

    recordable = False
    depth: int | None = None
    reads_hidden = False
    gives_confidence = True

    def attach(self, *, layers: int, hidden_size: int, embedding_size: int) -> None:
        """Nothing to learn."""

    def prepare(self, batch: StepBatch) -> None:
        """Raise if the batch has example ids, which would be ignored."""
        if batch.example_ids is not None:
            raise ValueError("example_ids is used only by RememberedScores; leave it out")

    def observe(self, seen: Observation) -> dict[str, Tensor]:
        """Nothing to learn."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: its parameters are saved elsewhere."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class FullDepthRouter(_StatelessRouter):
    """The whole model with its own head.

    Args:
        depth: Its layers.
    """

    recordable = True

    def __init__(self, depth: int) -> None:
        self.depth = depth

    def score(self, request: ScoreRequest) -> Scores:
        """Scores from the head values of the pass over all tokens."""
        # The nll comes almost free, and its mean is the full loss.
        return request.scores(request.statistics(request.fields | {"nll"}), full_depth=True)


class CallableRouter(_StatelessRouter):
    """A separate forward: another model, or any callable that returns logits.

    Args:
        router: The callable.
    """

    def __init__(self, router: Callable[..., Any]) -> None:
        self._router = router

    def score(self, request: ScoreRequest) -> Scores:
        """Scores from the logits that the callable returns."""
        tokens = request.batch.targets.tokens
        statistics = router_statistics(
            self._router,
            request.batch.arguments,
            tokens,
            shape=tokens.shape,
            fields=request.fields,
            ignore_index=request.settings.ignore_index,
            precision=request.settings.precision_of_scores,
        )
        return request.scores(statistics)


class OwnLayersRouter(CallableRouter):
    """The first layers of the trained model: read from its own context pass if that stops there.

    Args:
        router: The router, whose parameters are the model's.
    """

    recordable = True

    def __init__(self, router: TruncatedRouter) -> None:
        super().__init__(router)
        self.depth = router.num_layers

    def score(self, request: ScoreRequest) -> Scores:
        """Scores from the head values above its layers, or from a separate forward if there are none."""
        if request.values is None or request.depth != self.depth:
            return super().score(request)
        return request.scores(request.statistics(request.fields))


@dataclass(frozen=True)
class TimedRouter:
    """A router whose time is measured.

    Attributes:
        router: The router.
        stopwatch: Adds up the time of its scores and observations.
    """

    router: Router
    stopwatch: Stopwatch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.router, name)

    def score(self, request: ScoreRequest) -> Scores:
        """As the router's, timed."""
        with self.stopwatch.measure(request.batch.tokens.position_ids.device):
            return self.router.score(request)

    def observe(self, seen: Observation) -> dict[str, Tensor]:
        """The router's, timed."""
        with self.stopwatch.measure(seen.targets.device):
            return self.router.observe(seen)
