"""What cannot be combined with CGGR in a Trainer, said before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cggr_train.trainer.config import CGGRConfig


def check_supported(trainer: Any, config: CGGRConfig) -> None:
    """Raise where the Trainer would train on something else than it was asked to.

    Args:
        trainer: A Hugging Face Trainer that has been set up.
        config: The settings of CGGR.

    Raises:
        ValueError: Naming the argument, and what to use instead.
    """
    arguments, accelerator = trainer.args, trainer.accelerator
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
