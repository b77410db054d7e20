"""Which recorded steps are refused; tests/gpu replays them."""

import dataclasses

import pytest
import torch

from cggr_train.errors import InputError
from cggr_train.learner import Routing
from cggr_train.loop import build_optimizer
from cggr_train.recorded import check_recordable
from cggr_train.run import start_run
from cggr_train.settings import TrainSettings

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "routing", "processes", "message"),
    [
        ("cpu", {}, 1, r"--cuda-graph needs a CUDA device, but this runs on cpu; leave it out"),
        ("cuda", {}, 2, r"the step of a single process, but this run has 2"),
        ("cuda", {"ratio_warmup_steps": 5}, 1, r"--ratio-warmup-steps 5 changes it"),
        ("cuda", {"router": "remembered"}, 1, r"cannot capture --router remembered"),
        ("cuda", {"selection": "supervised"}, 1, r"cannot capture --selection supervised"),
    ],
)
def test_what_cannot_be_recorded_is_refused_with_the_reason(device, routing, processes, message):
    with pytest.raises(InputError, match=message):
        check_recordable(torch.device(device), "cggr", Routing(**routing), processes=processes)


@pytest.mark.parametrize("method", ["standard", "random", "cggr"])
def test_what_can_be_recorded_is_not(method):
    routing = Routing()
    if method != "cggr":  # these choose without scores
        routing = dataclasses.replace(routing, selection="supervised", router="remembered")
    check_recordable(GPU, method, routing)


def test_a_run_says_so_before_it_reads_the_text(tmp_path, data_files, console):
    given = TrainSettings(data=tuple(map(str, data_files)), config="nano", steps=1, device="cpu", cuda_graph=True)
    with pytest.raises(InputError, match="--cuda-graph needs a CUDA device"):
        start_run(given, tmp_path / "run", console)
    assert not (tmp_path / "run").exists()


def test_the_optimizer_of_a_recorded_step_keeps_its_count_on_the_device():
    model = torch.nn.Linear(2, 2)
    for capturable in (False, True):
        group = build_optimizer(model, weight_decay=0.1, capturable=capturable).param_groups[0]
        assert group["capturable"] == capturable
