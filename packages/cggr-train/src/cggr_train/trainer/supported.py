"""What cannot be combined with CGGR in a Trainer, said before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cggr_core import RememberedScores

if TYPE_CHECKING:
    from cggr_train.trainer.config import CGGRConfig


# Trainers whose own loss is the cross-entropy of the labels, which is what CGGR computes.
_PLAIN_LOSSES = {("transformers.trainer", "Trainer"), ("trl.trainer.sft_trainer", "SFTTrainer")}


def check_class(kind: type, mixin: type) -> None:
    """Raise where the mixin would not be asked for the loss, or would take the place of another one.

    Args:
        kind: A subclass of the mixin.
        mixin: :class:`~cggr_train.trainer.CGGRMixin`.

    Raises:
        TypeError: Naming the class, and what to write instead.
    """
    order = kind.__mro__
    losses = [base for base in order if "compute_loss" in vars(base)]
    for base in losses[: losses.index(mixin)]:
        if not issubclass(base, mixin):
            raise TypeError(
                f"{kind.__name__} has {base.__name__} before {mixin.__name__}, so that CGGR would never be asked for "
                f"the loss; write class {kind.__name__}({mixin.__name__}, {base.__name__})"
            )
    for base in losses[losses.index(mixin) + 1 :]:
        if (base.__module__, base.__name__) not in _PLAIN_LOSSES:
            raise TypeError(
                f"{base.__name__} has a compute_loss of its own, and CGGR computes the plain cross-entropy in its "
                f"place; {mixin.__name__} goes with Trainer, SFTTrainer and subclasses that leave compute_loss alone "
                f"(what is to be done around it belongs in {kind.__name__}, which calls super().compute_loss)"
            )


def check_supported(trainer: Any, config: CGGRConfig, router: Any) -> None:
    """Raise where the Trainer would train on something else than it was asked to.

    Args:
        trainer: A Hugging Face Trainer that has been set up.
        config: The settings of CGGR.
        router: A router of the caller's own, or None.

    Raises:
        ValueError: Naming the argument, and what to use instead.
    """
    arguments, accelerator = trainer.args, trainer.accelerator
    if isinstance(router, RememberedScores):
        raise ValueError(
            "router is RememberedScores, which has to know on the host which examples a batch holds, and whose scores "
            "are in no checkpoint of the Trainer; use cggr train --router remembered, or a loop of your own"
        )
    if arguments.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={arguments.label_smoothing_factor}: the loss of the kept tokens is the plain "
            "cross-entropy; leave it at 0"
        )
    if callable(trainer.compute_loss_func):
        raise ValueError("compute_loss_func would see a forward of all tokens; CGGR computes the loss, leave it out")
    if getattr(arguments, "loss_type", "nll") not in ("nll", "chunked_nll"):
        raise ValueError(f"loss_type={arguments.loss_type!r}: CGGR computes the plain cross-entropy, loss_type='nll'")
    if arguments.torch_compile:
        raise ValueError("torch_compile=True compiles a forward that CGGR does not run; leave it False")
    if arguments.neftune_noise_alpha and config.gradient in ("kv", "detached"):
        raise ValueError(
            f"neftune_noise_alpha={arguments.neftune_noise_alpha}: its noise depends on how many tokens a forward has, "
            f"and gradient={config.gradient!r} computes the kept ones apart; use gradient='exact' or leave it out"
        )
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs in one process mean DataParallel; start one process for each with torchrun or "
            "accelerate launch, or show only one with CUDA_VISIBLE_DEVICES"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError("DeepSpeed gathers parameters around the model's own layers; use DDP or FSDP2")
    if trainer.is_fsdp_enabled and getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ValueError("FSDP1 flattens parameters; use FSDP2: fsdp_config={'version': 2, ...}")
    parallelism = getattr(accelerator, "parallelism_config", None)
    for name in ("tp", "cp", "sp"):
        if parallelism is not None and getattr(parallelism, f"{name}_enabled", False):
            raise ValueError(f"parallelism_config splits sequences or matrices ({name}_size > 1); use DDP or FSDP2")
