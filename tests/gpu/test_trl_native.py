"""An update of TRL's trainers on two GPUs, under DDP and FSDP2, equals that of one process on all rows."""

import sys

import pytest
import torch

from tests.support.launchers import finish, launched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.device_count() < 2, reason=f"two ranks take a GPU each; {torch.cuda.device_count()} here"
    ),
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    pytest.importorskip("trl", reason="trl is not installed")
    folder = tmp_path_factory.mktemp("alone")
    finish([sys.executable, "-m", "tests.support.trl_ranks", "alone", str(folder)], CUDA_VISIBLE_DEVICES="0")
    return folder


@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_two_gpus_make_the_gradient_of_one(alone, tmp_path, engine):
    print(finish(launched("torchrun", 2, "-m", "tests.support.trl_ranks", engine, alone, tmp_path)).stdout)
