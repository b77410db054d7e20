"""CGGR inside the Hugging Face Trainer and its subclasses."""

from cggr_train.trainer.config import CGGRConfig
from cggr_train.trainer.mixin import CGGRMixin, CGGRTrainer

__all__ = ["CGGRConfig", "CGGRMixin", "CGGRTrainer"]
