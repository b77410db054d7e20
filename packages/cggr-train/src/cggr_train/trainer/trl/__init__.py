"""TRL's trainers: their own losses, with the layers' backward spent on the tokens that those losses are about."""

from cggr_train.trainer.trl.kinds import task_loss, trains_by_task

__all__ = ["task_loss", "trains_by_task"]
