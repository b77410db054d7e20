import copy

import torch

from cggr_core import CGGRModel
from cggr_core.stopwatch import Stopwatch
from tests.support.tiny_models import ROUTABLE, VOCAB

CPU = torch.device("cpu")


def test_it_adds_up_and_starts_anew_when_read():
    stopwatch = Stopwatch()
    for _ in range(2):
        with stopwatch.measure(CPU):
            torch.ones(10).sum()
    assert copy.deepcopy(stopwatch).read() == 0.0, "a copy has measured nothing"
    assert stopwatch.read() > 0.0
    assert stopwatch.read() == 0.0


def test_only_scoring_is_measured():
    input_ids = torch.randint(3, VOCAB, (2, 12))
    for selection, measured in (("stratified", True), ("random", False)):
        model = CGGRModel(ROUTABLE["llama"](), selection=selection).train()
        model.scoring_stopwatch = Stopwatch()
        model(input_ids, labels=input_ids)
        assert (model.scoring_stopwatch.read() > 0.0) == measured
