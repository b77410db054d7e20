"""Every name, default and check of a routed step, in one place.

The public constructors take these settings as keywords and build the dataclasses; the trainer's config, the command
line and the studies read the same names and defaults.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from cggr_core.checks import (
    check_at_least,
    check_choice,
    check_finite_number,
    check_flag,
    check_integer,
    check_ratio,
)

__all__ = [
    "CONTEXT_PRECISIONS",
    "CUDA_GRAPHS",
    "ENGINES",
    "GRADIENT_MODES",
    "KEY_VALUE_MODES",
    "MODEL_SELECTIONS",
    "ROUTERS",
    "SCOPES",
    "SCORELESS",
    "SCORINGS",
    "SELECTIONS",
    "SUPERVISED",
    "WITH_PROBABILITIES",
    "ContextPrecision",
    "CudaGraph",
    "EngineName",
    "GradientMode",
    "ModelSelection",
    "RouterName",
    "RoutingSettings",
    "Scoring",
    "SelectionSettings",
    "check_context_precision",
    "default_router_depth",
]

GradientMode = Literal["kv", "exact", "detached", "sequence"]
EngineName = Literal["interleaved", "two_pass"]
ContextPrecision = Literal["fp8"]
ModelSelection = Literal["stratified", "sampled", "random", "topk", "sequence_aware", "supervised"]
Scoring = Literal["gradnorm", "combined", "loss", "entropy", "margin", "excess"]
RouterName = Literal["full_depth", "truncated", "learned", "remembered"]
CudaGraph = Literal[False, "auto"]

GRADIENT_MODES: tuple[str, ...] = get_args(GradientMode)
"""What a kept token's gradient reaches; see :class:`~cggr_core.CGGRModel`."""
KEY_VALUE_MODES = ("kv", "detached")
"""The gradient modes whose passes route keys and values."""
ENGINES: tuple[str, ...] = get_args(EngineName)
"""How the modes of :data:`KEY_VALUE_MODES` are computed."""
CONTEXT_PRECISIONS: tuple[str, ...] = get_args(ContextPrecision)
"""Precisions, besides the model's own, for matrix products on tokens that need no gradient."""
SUPERVISED = "supervised"
"""The selection of exactly the countable tokens, only in :class:`~cggr_core.CGGRModel`."""
MODEL_SELECTIONS: tuple[str, ...] = get_args(ModelSelection)
"""The selections of :class:`~cggr_core.CGGRModel`."""
SELECTIONS = tuple(name for name in MODEL_SELECTIONS if name != SUPERVISED)
"""The strategies of :func:`~cggr_core.select`."""
WITH_PROBABILITIES = frozenset({"stratified", "sampled", "random"})
"""Selections that know the probability of every token, and weight by its inverse."""
SCORELESS = frozenset({"random", SUPERVISED})
"""Selections that use no score."""
SCOPES = ("row", "batch")
"""Scopes over which a selection keeps its ratio."""
SCORINGS: tuple[str, ...] = get_args(Scoring)
"""The scores of tokens; see :func:`~cggr_core.score`."""
ROUTERS: tuple[str, ...] = get_args(RouterName)
"""Names of routers, for configurations and command lines."""
CUDA_GRAPHS: tuple[bool | str, ...] = get_args(CudaGraph)
"""Whether steps are recorded as CUDA graphs."""


def default_router_depth(num_layers: int) -> int:
    """Layers of a truncated or learned router over a model with ``num_layers``: an eighth, at least 1.

    Example:
        >>> default_router_depth(30)
        3
    """
    return max(1, num_layers // 8)


def check_context_precision(precision: str | None, mode_name: str, mode: str) -> None:
    """Raise unless tokens without a gradient can be computed in this precision.

    Args:
        precision: One of :data:`CONTEXT_PRECISIONS` or ``None``.
        mode_name: Name of the argument that holds the mode.
        mode: The gradient mode.

    Raises:
        ValueError: If it is unknown, or the mode has no such tokens.

    Example:
        >>> check_context_precision("fp8", "gradient", "kv")
    """
    if precision is None:
        return
    check_choice("context_precision", precision, CONTEXT_PRECISIONS)
    if mode not in KEY_VALUE_MODES:
        raise ValueError(
            f"context_precision={precision!r} applies only to {mode_name}='kv' and 'detached', but "
            f"{mode_name} is {mode!r}; leave context_precision=None"
        )


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """How tokens are scored and kept: settings of the losses and the scorer, and part of :class:`RoutingSettings`.

    Attributes:
        scoring: One of :data:`SCORINGS`.
        selection: One of :data:`SELECTIONS` (of :data:`MODEL_SELECTIONS` for a model).
        num_strata: Score buckets of ``stratified``.
        min_tokens_per_sequence: Minimum number of kept tokens per row for ``sequence_aware``.
        block_size: Choose blocks of this many neighbouring tokens.
        unbiased: Weight kept tokens by 1 / inclusion probability.
        min_tokens_ratio: Keep ratio in (0, 1], after the warm-up.
        warmup_steps: Steps over which the ratio falls from 1 to ``min_tokens_ratio``.
        dynamic_threshold: Let the batch's confidence change the ratio, see :class:`~cggr_core.Schedule`.
        threshold_sensitivity: How strongly it does; 0 switches it off.
        seed: Seed of the random choices.
        ignore_index: Label that is never scored, kept or counted.

    Raises:
        TypeError: If a setting has a wrong type.
        ValueError: If a name or a number is not accepted, or a setting would have no effect.

    Example:
        >>> SelectionSettings(selection="topk").scoring
        'gradnorm'
    """

    scoring: str = "gradnorm"
    selection: str = "stratified"
    num_strata: int = 4
    min_tokens_per_sequence: int = 1
    block_size: int = 1
    unbiased: bool = True
    min_tokens_ratio: float = 0.25
    warmup_steps: int = 0
    dynamic_threshold: bool = False
    threshold_sensitivity: float = 0.5
    seed: int = 0
    ignore_index: int = -100

    _selections: ClassVar[tuple[str, ...]] = SELECTIONS

    def __post_init__(self) -> None:
        check_choice("selection", self.selection, self._selections)
        check_choice("scoring", self.scoring, SCORINGS)
        check_at_least("num_strata", self.num_strata, 1)
        check_at_least("min_tokens_per_sequence", self.min_tokens_per_sequence, 0)
        check_at_least("block_size", self.block_size, 1)
        check_flag("unbiased", self.unbiased)
        check_ratio("min_tokens_ratio", self.min_tokens_ratio)
        check_at_least("warmup_steps", self.warmup_steps, 0)
        check_flag("dynamic_threshold", self.dynamic_threshold)
        check_finite_number("threshold_sensitivity", self.threshold_sensitivity, minimum=0.0)
        check_at_least("seed", self.seed, 0)
        check_integer("ignore_index", self.ignore_index)
        if not self.dynamic_threshold and self.threshold_sensitivity not in (0.0, type(self).threshold_sensitivity):
            raise ValueError(
                f"threshold_sensitivity={self.threshold_sensitivity} has an effect only with dynamic_threshold=True; "
                "set that, or leave threshold_sensitivity out"
            )

    @property
    def reads_scores(self) -> bool:
        """Whether the selection looks at scores."""
        return self.selection not in SCORELESS


@dataclass(frozen=True, kw_only=True)
class RoutingSettings(SelectionSettings):
    """All settings of a :class:`~cggr_core.CGGRModel` besides its model and its router.

    Settings of one selection (``num_strata``, ``min_tokens_per_sequence``, ``scoring``) are accepted with all others,
    so that selections can be compared with everything else equal.

    Attributes:
        gradient: One of :data:`GRADIENT_MODES`.
        engine: One of :data:`ENGINES`; ``None`` takes the cheaper one that the scores allow.
        context_precision: One of :data:`CONTEXT_PRECISIONS`, for linear layers on tokens that need no gradient;
            ``None`` for the model's own.
        score_precision: One of :data:`CONTEXT_PRECISIONS`, for the head's product that scores are made from; ``None``
            for ``context_precision``.
        reuse_outputs: Hold the outputs of linear layers from the context pass until the gradient pass, which then does
            not compute them again for kept tokens.
        context_margin: Let gradients also reach this many tokens before each supervised stretch, without a loss on
            them.
        cuda_graph: One of :data:`CUDA_GRAPHS`: ``"auto"`` records steps of equal shapes as CUDA graphs if that saves
            time, and logs why if it does not; no effect on other devices.

    Raises:
        TypeError: If a setting has a wrong type.
        ValueError: If a name or a number is not accepted, or a setting would have no effect.

    Example:
        >>> RoutingSettings(gradient="exact", min_tokens_ratio=0.5).selection
        'stratified'
    """

    gradient: str = "kv"
    engine: str | None = None
    context_precision: str | None = None
    score_precision: str | None = None
    reuse_outputs: bool = False
    context_margin: int = 0
    cuda_graph: CudaGraph = "auto"

    _selections: ClassVar[tuple[str, ...]] = MODEL_SELECTIONS

    def __post_init__(self) -> None:
        check_choice("gradient", self.gradient, GRADIENT_MODES)
        if not any(self.cuda_graph is choice or self.cuda_graph == choice == "auto" for choice in CUDA_GRAPHS):
            raise ValueError(f"cuda_graph must be 'auto' or False, got {self.cuda_graph!r}")
        super().__post_init__()
        if self.engine is not None:
            check_choice("engine", self.engine, ENGINES)
            if not self.routes_keys_and_values:
                raise ValueError(
                    f"engine={self.engine!r} applies to gradient='kv' and 'detached', but gradient is "
                    f"{self.gradient!r}; leave engine=None"
                )
        check_context_precision(self.context_precision, "gradient", self.gradient)
        if self.score_precision is not None:
            check_choice("score_precision", self.score_precision, CONTEXT_PRECISIONS)
            if not self.reads_scores:
                raise ValueError(
                    f"score_precision={self.score_precision!r} applies to scores, but selection={self.selection!r} "
                    "uses none; leave score_precision=None"
                )
        if check_flag("reuse_outputs", self.reuse_outputs):
            self._check_reuse()
        check_at_least("context_margin", self.context_margin, 0)
        if self.context_margin and not (self.selection == SUPERVISED and self.routes_keys_and_values):
            raise ValueError(
                f"context_margin={self.context_margin} requires selection='supervised' and gradient='kv' or "
                f"'detached', but selection is {self.selection!r} and gradient {self.gradient!r}; leave "
                "context_margin=0"
            )
        if self.selection == SUPERVISED:
            self._check_supervised()
        if self.dynamic_threshold and not self.reads_scores:
            raise ValueError(
                f"dynamic_threshold needs the confidence of scored tokens, but selection={self.selection!r} scores none"
            )
        if self.gradient == "sequence":
            self._check_sequence()

    @property
    def routes_keys_and_values(self) -> bool:
        """Whether the gradient mode is one of :data:`KEY_VALUE_MODES`."""
        return self.gradient in KEY_VALUE_MODES

    @property
    def precision_of_scores(self) -> str | None:
        """Precision of the head's product that scores are made from; ``None`` for the model's own."""
        return self.context_precision if self.score_precision is None else self.score_precision

    def check_router(self, router: Any, *, gives_confidence: bool, by_head: bool) -> None:
        """Raise unless a router works with these settings.

        Args:
            router: What scores; ``None`` for the model itself at full depth.
            gives_confidence: Whether it gives the model's confidence at every token.
            by_head: Whether it reads the model's own head.

        Raises:
            ValueError: If it would be ignored, or lacks what is needed.
        """
        if router is not None and not self.reads_scores:
            raise ValueError(
                f"a router scores tokens, but selection={self.selection!r} uses no score; leave router=None"
            )
        if self.dynamic_threshold and not gives_confidence:
            raise ValueError(
                f"dynamic_threshold needs the model's confidence at every token, but {type(router).__name__} gives "
                "only scores; use a truncated router or none"
            )
        if self.score_precision is not None and not by_head:
            raise ValueError(
                f"score_precision={self.score_precision!r} is the precision of the model's head, but "
                f"{type(router).__name__} scores without it; leave score_precision=None"
            )
        if self.engine == "interleaved" and router is None and self.reads_scores:
            raise ValueError(
                "engine='interleaved' needs the selection before the layers run: pass a router "
                "(create_truncated_router(model)), selection='random' or 'supervised', or leave engine=None"
            )

    def _check_reuse(self) -> None:
        if not self.routes_keys_and_values:
            raise ValueError(
                f"reuse_outputs=True applies to gradient='kv' and 'detached', but gradient is {self.gradient!r}; leave "
                "reuse_outputs=False"
            )
        if self.context_precision is not None:
            raise ValueError(
                f"reuse_outputs=True would give kept tokens the context's outputs in {self.context_precision}; leave "
                "reuse_outputs=False or context_precision=None"
            )
        if not self.reads_scores and self.engine != "two_pass":
            raise ValueError(
                f"reuse_outputs=True has an effect only on layers that run twice, but selection={self.selection!r} "
                "needs one pass; leave reuse_outputs=False"
            )

    def _check_supervised(self) -> None:
        if self.gradient == "sequence":
            raise ValueError(
                "selection='supervised' keeps tokens, but gradient='sequence' keeps whole sequences; use another "
                "gradient mode"
            )
        for name in ("block_size", "warmup_steps"):
            value, nothing = getattr(self, name), getattr(type(self), name)
            if value != nothing:
                raise ValueError(
                    f"{name}={value} would change which tokens are kept, but selection='supervised' keeps exactly the "
                    f"countable ones; leave {name}={nothing}"
                )

    def _check_sequence(self) -> None:
        if self.selection == "sequence_aware":
            raise ValueError(
                "selection='sequence_aware' keeps tokens of every sequence, but gradient='sequence' drops whole "
                "sequences; use selection='topk'"
            )
        if self.block_size != type(self).block_size:
            raise ValueError(
                f"block_size={self.block_size} selects blocks of tokens, but gradient='sequence' keeps whole "
                "sequences; leave block_size=1"
            )
