"""Small runs of ``cggr train``: their settings, their final weights, and a signal during a run."""

import os
import signal

from cggr_train.checkpoint import latest_checkpoint
from cggr_train.presets import load_model
from cggr_train.run import resume_run, start_run
from cggr_train.settings import TrainSettings


def settings(data_files, **values):
    small = {
        "config": "nano", "vocab_size": 300, "length": 32, "batch_size": 2, "steps": 6, "log_every": 2, "eval_every": 3,
        "eval_sequences": 4, "save_every": 4, "heldout_fraction": 0.2, "method": "standard",
    }  # fmt: skip
    return TrainSettings(data=tuple(map(str, data_files)), **{**small, **values})


def parameters(folder):
    return dict(load_model(str(latest_checkpoint(folder / "checkpoints"))).named_parameters())


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """Send a signal to ourselves right after an optimizer step, as if from the keyboard."""
    from cggr_train import run as module

    original = module._Run._after_step

    def after_step(self, loss, rate):
        original(self, loss, rate)
        if self.progress.step == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(module._Run, "_after_step", after_step)


def assert_continues_exactly(wanted, folder, console, monkeypatch, *, interrupted_at):
    """A run that is interrupted after a step and resumed ends with the weights of one that was not.

    The runs are in ``folder / "whole"`` and ``folder / "parts"``; what the interrupted and the resumed one returned.
    """
    start_run(wanted, folder / "whole", console)
    with monkeypatch.context() as patch:
        interrupt_at(patch, interrupted_at)
        stopped = start_run(wanted, folder / "parts", console)
    resumed = resume_run(folder / "parts", console)
    whole, parts = parameters(folder / "whole"), parameters(folder / "parts")
    assert all(parameter.equal(parts[key]) for key, parameter in whole.items())
    return stopped, resumed
