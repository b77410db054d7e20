"""TRL's trainers: their own losses, with a backward pass only for the tokens that the losses use."""

from cggr_train.trainer.trl.kinds import kind_of, task_loss, trains_by_task
from cggr_train.trainer.trl.router_loss import take_router_coefficient
from cggr_train.trainer.trl.token_count import TokenCount

__all__ = ["TokenCount", "kind_of", "take_router_coefficient", "task_loss", "trains_by_task"]
