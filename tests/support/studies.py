"""Small studies that measure in the test's own process."""

import functools

import torch

from cggr_train.settings import TrainSettings
from cggr_train.study import StudySettings
from cggr_train.study.context import StudyContext
from cggr_train.study.worker import answer

CPU = torch.device("cpu")


class OwnPool:
    """Answers requests in this process."""

    def __init__(self, folder, where):
        self.folder = folder

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def run(self, requests, *, on_progress, stop, alone=False):
        for request in requests:
            if stop():
                return
            tell = functools.partial(on_progress, request)
            result = answer(
                StudyContext(self.folder, CPU), request.body, lambda event, tell=tell, **values: tell(values), stop
            )
            if result is not None:
                yield request, result


def settings(data_files, train=(), **values):
    """A study that takes seconds; ``train`` changes the settings that all arms share."""
    shape = dict(
        data=tuple(map(str, data_files)), config="nano", vocab_size=300, length=32, batch_size=4, steps=6,
        heldout_fraction=0.3, eval_sequences=8, device="cpu",
    )  # fmt: skip
    shared = TrainSettings(**{**shape, **dict(train)})
    given = {"seeds": 2, "evaluations": 2, "draws": 2, "gradient_batches": 1, "calibration_seconds": 0.01,
             "controls": ("equal_cost",)}  # fmt: skip
    return StudySettings(train=shared, **{**given, "equal": ("tokens",), **values})
