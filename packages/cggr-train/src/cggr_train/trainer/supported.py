"""Refuses what cannot be combined with CGGR in a Trainer, before training starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cggr_core.experimental import RememberedScores
from cggr_train.trainer.trl.kinds import KNOWN

if TYPE_CHECKING:
    from cggr_train.trainer.config import CGGRConfig


# Trainers with a known loss: the cross-entropy of the labels, or a loss that is routed unchanged.
_KNOWN_LOSSES = {("transformers.trainer", "Trainer"), *KNOWN}


def check_class(kind: type, mixin: type) -> None:
    """Raise if the mixin's loss would never be called, or would replace a loss of another kind.

    Args:
        kind: A subclass of the mixin.
        mixin: :class:`~cggr_train.trainer.CGGRMixin`.

    Raises:
        TypeError: With the class's name and what to write instead.
    """
    order = kind.__mro__
    losses = [base for base in order if {"compute_loss", "_compute_loss"} & vars(base).keys()]
    for base in losses[: losses.index(mixin)]:
        if not issubclass(base, mixin):
            raise TypeError(
                f"{kind.__name__} has {base.__name__} before {mixin.__name__}, so CGGR would never compute "
                f"the loss; write class {kind.__name__}({mixin.__name__}, {base.__name__})"
            )
    for base in losses[losses.index(mixin) + 1 :]:
        if (base.__module__, base.__name__) not in _KNOWN_LOSSES:
            known = ", ".join(sorted(name for _, name in _KNOWN_LOSSES))
            raise TypeError(
                f"{base.__name__} computes its own loss, and CGGR cannot tell which tokens it uses; {mixin.__name__} "
                f"works with {known} and with subclasses that do not override compute_loss (to wrap it, override it in "
                f"{kind.__name__} and call super().compute_loss)"
            )


def check_supported(trainer: Any, config: CGGRConfig, router: Any, *, own_loss: bool) -> None:
    """Raise if the Trainer would train on something other than what was asked for.

    Args:
        trainer: A Hugging Face Trainer after ``__init__``.
        config: The settings of CGGR.
        router: A custom router, or None.
        own_loss: Whether the trainer's own loss is routed, rather than the cross-entropy of tokens selected by a score.

    Raises:
        ValueError: Naming the argument, and what to use instead.
    """
    arguments, accelerator = trainer.args, trainer.accelerator
    if own_loss and router is not None:
        raise ValueError(
            "router scores tokens by their cross-entropy, but this trainer selects tokens for its own loss; leave "
            "router out"
        )
    if not own_loss and config.skip_zero_advantage is not None:
        raise ValueError(
            f"skip_zero_advantage={config.skip_zero_advantage} has no effect: a cross-entropy has no advantages; it is "
            "for GRPOTrainer and RLOOTrainer, so leave it unset"
        )
    if isinstance(router, RememberedScores):
        raise ValueError(
            "router is RememberedScores, which needs the example ids of a batch on the host, and whose scores the "
            "Trainer would not save; use cggr train --router remembered, or your own loop"
        )
    if arguments.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={arguments.label_smoothing_factor}: kept tokens are trained on plain "
            "cross-entropy; leave it at 0"
        )
    if callable(trainer.compute_loss_func):
        raise ValueError(
            "compute_loss_func needs a forward of all tokens, but CGGR computes the loss itself; leave it out"
        )
    if not own_loss and getattr(arguments, "loss_type", "nll") not in ("nll", "chunked_nll"):
        raise ValueError(
            f"loss_type={arguments.loss_type!r}: tokens selected by a score are trained on plain cross-entropy; use "
            "loss_type='nll', or selection='supervised'"
        )
    if arguments.torch_compile:
        raise ValueError("torch_compile=True compiles a forward that CGGR does not use; set it to False")
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs in one process mean DataParallel; start one process per GPU with torchrun or "
            "accelerate launch, or select one GPU with CUDA_VISIBLE_DEVICES"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError("DeepSpeed gathers parameters around the model's own layers; use DDP or FSDP2")
    if trainer.is_fsdp_enabled and getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ValueError("FSDP1 flattens parameters; use FSDP2: fsdp_config={'version': 2, ...}")
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        if parallelism is not None and getattr(parallelism, f"{name}_enabled", False):
            raise ValueError(f"parallelism_config splits sequences or matrices ({name}_size > 1); use DDP or FSDP2")
