"""CGGR's settings as a dataclass, for code, command lines (``HfArgumentParser``) and YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from cggr_core.settings import (
    ContextPrecision,
    CudaGraph,
    EngineName,
    GradientMode,
    ModelSelection,
    RoutingSettings,
    Scoring,
    default_router_depth,
)

if TYPE_CHECKING:
    from torch import nn

    from cggr_core import CGGRModel


@dataclass(kw_only=True)
class CGGRConfig:
    """How tokens are scored and kept, and what their gradient reaches: the arguments of :class:`cggr_core.CGGRModel`.

    The defaults of three settings depend on the trainer. ``selection``: ``"stratified"`` for the cross-entropy of
    Trainer and SFTTrainer; ``"supervised"`` for DPO, KTO, GRPO and RLOO, whose losses determine their tokens;
    ``"topk"`` for distillation. ``scoring``: ``"gradnorm"``; ``"entropy"`` of the student for distillation.
    ``min_tokens_ratio``: 0.25; 0.5 for distillation.

    It shares no field name with ``TrainingArguments``, so ``HfArgumentParser`` reads both from one command line or one
    YAML file.

    Example:
        >>> from transformers import HfArgumentParser, TrainingArguments
        >>> parser = HfArgumentParser((TrainingArguments, CGGRConfig))
        >>> arguments, cggr = parser.parse_args_into_dataclasses(["--output_dir", "out", "--gradient", "exact"])
        >>> cggr.gradient
        'exact'
    """

    gradient: GradientMode = field(
        default=cast(GradientMode, RoutingSettings.gradient),
        metadata={"help": "Gradient mode: what a kept token's gradient reaches."},
    )
    min_tokens_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Keep ratio: kept tokens / countable tokens, in (0, 1]; "
            f"{RoutingSettings.min_tokens_ratio} if not given."
        },
    )
    selection: ModelSelection | None = field(
        default=None,
        metadata={"help": "How the kept tokens are chosen; 'supervised' keeps exactly those with a label."},
    )
    scoring: Literal[Scoring, "divergence"] | None = field(
        default=None,
        metadata={"help": "Score of a token; 'excess' needs reference_nll in the batches, 'divergence' a teacher."},
    )
    router: Literal["full_depth", "truncated", "learned"] = field(
        default="full_depth",
        metadata={
            "help": "Source of the scores: the whole model, its first layers, or a learned head on their output."
        },
    )
    router_depth: int | None = field(
        default=None,
        metadata={"help": "Layers of a truncated or learned router; an eighth of the model's if not given."},
    )
    engine: EngineName | None = field(
        default=cast(EngineName | None, RoutingSettings.engine),
        metadata={"help": "Engine of kv and detached; the cheaper one if not given."},
    )
    context_precision: ContextPrecision | None = field(
        default=cast(ContextPrecision | None, RoutingSettings.context_precision),
        metadata={
            "help": "Precision of linear layers on tokens that need no gradient (kv and detached); the model's own if "
            "not given."
        },
    )
    context_margin: int = field(
        default=RoutingSettings.context_margin,
        metadata={
            "help": "Let gradients also reach this many tokens before each supervised stretch (selection "
            "supervised); rows in TRL's preference and policy trainers then do not share prompts."
        },
    )
    num_strata: int = field(
        default=RoutingSettings.num_strata, metadata={"help": "Score buckets of the stratified selection."}
    )
    min_tokens_per_sequence: int = field(
        default=RoutingSettings.min_tokens_per_sequence,
        metadata={"help": "Minimum number of kept tokens per row for sequence_aware, which otherwise equals topk."},
    )
    block_size: int = field(
        default=RoutingSettings.block_size, metadata={"help": "Keep blocks of this many neighbouring tokens."}
    )
    unbiased: bool = field(
        default=RoutingSettings.unbiased, metadata={"help": "Weight kept tokens by 1 / inclusion probability."}
    )
    ratio_warmup_steps: int = field(
        default=RoutingSettings.warmup_steps,
        metadata={"help": "Optimizer steps over which the keep ratio falls from 1 to min_tokens_ratio."},
    )
    dynamic_threshold: bool = field(
        default=RoutingSettings.dynamic_threshold, metadata={"help": "Adapt the keep ratio to the batch's confidence."}
    )
    threshold_sensitivity: float = field(
        default=RoutingSettings.threshold_sensitivity,
        metadata={"help": "How strongly the confidence changes the ratio."},
    )
    selection_seed: int | None = field(
        default=None, metadata={"help": "Seed of the selections; the seed of the training arguments if not given."}
    )
    cuda_graph: CudaGraph | None = field(
        default=None,
        metadata={
            "help": "'auto' captures steps of equal shapes as CUDA graphs when that saves time, False does not. By "
            "default, steps of CGGRModel are captured, and the updates of TRL's own losses are not."
        },
    )
    skip_zero_advantage: bool | None = field(
        default=None,
        metadata={"help": "Leave rows with zero advantage out of a policy update; by default only if that is exact."},
    )

    def build(self, model: nn.Module, *, seed: int = 0, **overrides: Any) -> CGGRModel:
        """Wrap a model according to these settings.

        Args:
            model: A Hugging Face language model, or a PEFT wrapper of one.
            seed: Seed of the selections, unless ``selection_seed`` is set.
            **overrides: Arguments of :class:`cggr_core.CGGRModel` that override these settings, for example your own
                ``router``.

        Raises:
            TypeError: If a setting has a wrong type, or ``model`` is not a Hugging Face model.
            ValueError: If a setting or a combination of settings is invalid.
        """
        from cggr_core import CGGRModel

        settings: dict[str, Any] = {
            "router": None if "router" in overrides else self._router(model),
            "gradient": self.gradient,
            "min_tokens_ratio": given(self.min_tokens_ratio, RoutingSettings.min_tokens_ratio),
            "selection": given(self.selection, RoutingSettings.selection),
            "scoring": given(self.scoring, RoutingSettings.scoring),
            "engine": self.engine,
            "context_precision": self.context_precision,
            "context_margin": self.context_margin,
            "cuda_graph": RoutingSettings.cuda_graph if self.cuda_graph is None else self.cuda_graph,
            "num_strata": self.num_strata,
            "min_tokens_per_sequence": self.min_tokens_per_sequence,
            "block_size": self.block_size,
            "unbiased": self.unbiased,
            "warmup_steps": self.ratio_warmup_steps,
            "dynamic_threshold": self.dynamic_threshold,
            "threshold_sensitivity": self.threshold_sensitivity,
            "seed": seed if self.selection_seed is None else self.selection_seed,
        }
        return CGGRModel(model, **{**settings, **overrides})

    def _router(self, model: nn.Module) -> Any:
        from cggr_core import create_truncated_router
        from cggr_core.experimental import LearnedRouter

        if self.router == "full_depth":
            return None
        if self.router == "truncated":
            return create_truncated_router(model, num_layers=self.router_depth)
        if self.router == "learned":
            layers = cast(Any, model).config.get_text_config().num_hidden_layers
            return LearnedRouter(depth=self.router_depth or default_router_depth(layers))
        raise ValueError(f"router must be 'full_depth', 'truncated' or 'learned', got {self.router!r}")


def given(value: Any, default: Any) -> Any:
    """A setting, or its default where it is left out."""
    return default if value is None else value
