"""An update on two ranks under DDP and FSDP2 equals that of one process on all rows, even if a rank has none."""

import pytest

from tests.support.trl_kit import QUIET
from tests.support.trl_ranks import on_a_rank, one_process
from tests.support.two_ranks import run_on_two_ranks

pytestmark = QUIET


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    one_process(folder)
    return folder


@pytest.mark.filterwarnings("ignore:No device id is provided:UserWarning")
@pytest.mark.parametrize("engine", ["DDP", "FSDP2"])
def test_two_ranks_make_the_gradient_of_one(alone, tmp_path, engine):
    run_on_two_ranks(on_a_rank, engine, alone, tmp_path, folder=tmp_path)
