"""CGGR as a Lightning module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_train.trainer.batch import routed_batch
from cggr_train.trainer.config import CGGRConfig

try:
    import lightning
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
except ImportError as error:
    raise ImportError("CGGRModule needs lightning: python -m pip install 'lightning>=2.5'") from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cggr_core import CGGRModel

__all__ = ["CGGRModule"]


class CGGRModule(lightning.LightningModule):
    """LightningModule around a Hugging Face model that runs the backward pass for the kept tokens only.

    ``lightning.Trainer().fit(CGGRModule(model), dataloader)``; batches are dictionaries of the model's arguments,
    including labels. Validation uses the full loss. Checkpoints hold the plain model under ``model.`` and the state of
    the selections, so that a resumed fit makes the same selections as an uninterrupted one.

    As everywhere in Lightning, losses are averaged over accumulated batches and ranks, regardless of their token
    counts.

    Override ``configure_optimizers`` for another optimizer.

    Args:
        model: A Hugging Face language model, or a PEFT wrapper of one.
        cggr: Settings of CGGR; defaults if not given.
        learning_rate: Learning rate of AdamW.
        seed: Seed of the selections.

    Raises:
        ValueError: If a setting is invalid, or, in ``fit``, if the strategy is neither a single device nor DDP.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                      num_attention_heads=4)
        >>> module = CGGRModule(LlamaForCausalLM(config), CGGRConfig(min_tokens_ratio=0.5))
        >>> module.routed.settings.gradient
        'kv'
    """

    routed: CGGRModel

    def __init__(
        self,
        model: PreTrainedModel,
        cggr: CGGRConfig | None = None,
        *,
        learning_rate: float = 1e-4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        # Not a submodule: the model's parameters are registered once, under their own names.
        self.__dict__["routed"] = (CGGRConfig() if cggr is None else cggr).build(model, seed=seed)
        self._step, self._rows = -1, 0

    def setup(self, stage: str) -> None:
        """Refuse strategies for which a step has not been shown to equal that of a single device.

        Raises:
            ValueError: Under FSDP, model parallelism or DeepSpeed.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
            raise ValueError(
                f"strategy must be a single device or DDP (strategy='ddp'), got {type(strategy).__name__}; for FSDP2 "
                "use cggr_train.CGGRTrainer or Accelerate"
            )

    def forward(self, **batch: Any) -> Any:
        """The plain model."""
        return self.model(**batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The loss of the kept tokens; logs ``train_loss`` and what was kept."""
        self.routed.train()
        arguments = routed_batch(batch)
        rows = len(arguments["labels"])
        if self._step != self.global_step:
            self._step, self._rows = self.global_step, 0
        first_row = self._rows * self.trainer.world_size + self.global_rank * rows
        loss = self.routed(**arguments, draw=self.global_step, first_row=first_row)
        self._rows += rows
        wanted = ("keep_ratio", "kept_tokens", "score_kept", "score_dropped", "gradnorm_kept", "full_loss")
        metrics = {name: value.float() for name, value in self.routed.metrics.items() if name in wanted}
        self.log_dict({"train_loss": loss.detach(), **metrics}, batch_size=rows)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The full loss; logs ``val_loss``, weighted by the tokens it is a mean of."""
        loss = self.model(**batch).loss
        self.log("val_loss", loss, batch_size=int((batch["labels"][:, 1:] != -100).sum()), sync_dist=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the trainable parameters."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(parameters, lr=self.learning_rate)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Advance the keep ratio with the optimizer."""
        while self.routed.schedule.steps < self.global_step:
            self.routed.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the state of the selections."""
        checkpoint["cggr"] = self.routed.routing_state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the state of the selections."""
        self.routed.load_routing_state_dict(checkpoint["cggr"])
