"""What cannot be combined with CGGR in a Trainer, said before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cggr_core.experimental import RememberedScores
from cggr_train.trainer.trl.kinds import KNOWN

if TYPE_CHECKING:
    from cggr_train.trainer.config import CGGRConfig


# Trainers whose loss is known: the cross-entropy of the labels, or one that is routed as it stands.
_KNOWN_LOSSES = {("transformers.trainer", "Trainer"), *KNOWN}


def check_class(kind: type, mixin: type) -> None:
    """Raise where the mixin would not be asked for the loss, or would take the place of another one.

    Args:
        kind: A subclass of the mixin.
        mixin: :class:`~cggr_train.trainer.CGGRMixin`.

    Raises:
        TypeError: Naming the class, and what to write instead.
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
                f"{base.__name__} has a loss of its own, and which tokens it is about is not known; {mixin.__name__} "
                f"goes with {known} and subclasses that leave compute_loss alone (what is to be done around it "
                f"belongs in {kind.__name__}, which calls super().compute_loss)"
            )


def check_supported(trainer: Any, config: CGGRConfig, router: Any, *, own_loss: bool) -> None:
    """Raise where the Trainer would train on something else than it was asked to.

    Args:
        trainer: A Hugging Face Trainer that has been set up.
        config: The settings of CGGR.
        router: A router of the caller's own, or None.
        own_loss: Whether the trainer's own loss is routed, rather than the cross-entropy of tokens picked by a score.

    Raises:
        ValueError: Naming the argument, and what to use instead.
    """
    arguments, accelerator = trainer.args, trainer.accelerator
    if own_loss and router is not None:
        raise ValueError(
            "router scores tokens for their cross-entropy, but this trainer's loss determines its own; leave it out"
        )
    if isinstance(router, RememberedScores):
        raise ValueError(
            "router is RememberedScores, which needs the examples of a batch on the host, and whose scores the Trainer "
            "does not save; use cggr train --router remembered, or your own loop"
        )
    if arguments.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={arguments.label_smoothing_factor}: the loss of the kept tokens is the plain "
            "cross-entropy; leave it at 0"
        )
    if callable(trainer.compute_loss_func):
        raise ValueError(
            "compute_loss_func would see a forward of all tokens, but CGGR computes the loss; leave it out"
        )
    if not own_loss and getattr(arguments, "loss_type", "nll") not in ("nll", "chunked_nll"):
        raise ValueError(
            f"loss_type={arguments.loss_type!r}: tokens picked by a score learn from the plain cross-entropy; use "
            "loss_type='nll', or selection='supervised'"
        )
    if arguments.torch_compile:
        raise ValueError("torch_compile=True compiles a forward that CGGR does not run; set it to False")
    if arguments.neftune_noise_alpha and config.gradient in ("kv", "detached"):
        raise ValueError(
            f"neftune_noise_alpha={arguments.neftune_noise_alpha}: its noise depends on the number of tokens in a "
            "forward, "
            f"but gradient={config.gradient!r} computes kept tokens separately; use gradient='exact' or leave it out"
        )
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
