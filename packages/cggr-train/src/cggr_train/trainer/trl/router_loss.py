"""TRL's coefficient of the expert routers' balancing loss, in steps whose loss is not TRL's."""

from __future__ import annotations

from typing import Any

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "router_aux_loss_coefficient")


def take_router_coefficient(trainer: Any) -> None:
    """Give a model SFTTrainer's ``router_aux_loss_coef``: many note their config's when they are made, and keep that.

    Args:
        trainer: An SFTTrainer, which has set its config already.
    """
    if not trainer.aux_loss_enabled:
        return
    from cggr_core.routing import unwrapped  # a fifth of a second, for what few trainers have

    base = unwrapped(trainer.model)
    config = base.config.get_text_config()
    config.output_router_logits = True
    for holder in (base, config):
        for name in COEFFICIENTS:
            if getattr(holder, name, None) is not None:
                setattr(holder, name, trainer.router_aux_loss_coef)
