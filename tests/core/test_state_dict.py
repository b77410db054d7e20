"""A CGGRModel's state can be saved and loaded by any module that contains it."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from cggr_core import CGGRModel
from tests.support.tiny_models import ROUTABLE


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


HOLDERS = {"alone": lambda model: model, "outer": Outer, "ddp": DistributedDataParallel, "averaged": AveragedModel}


@pytest.mark.parametrize("holder", HOLDERS)
def test_round_trip(holder: str, process_group: None) -> None:
    hold: Callable[[nn.Module], nn.Module] = HOLDERS[holder]
    source, target = (hold(CGGRModel(ROUTABLE["llama"]())) for _ in range(2))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    found = target.load_state_dict(copy.deepcopy(source.state_dict()))
    assert not found.missing_keys and not found.unexpected_keys
    wanted = dict(source.named_parameters())
    assert wanted and all(value.equal(wanted[name]) for name, value in target.named_parameters())


@pytest.mark.parametrize("holder", ["alone", "outer", "ddp"])
def test_distributed_checkpoint(holder: str, process_group: None) -> None:
    source, target = (HOLDERS[holder](CGGRModel(ROUTABLE["llama"]())) for _ in range(2))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    set_model_state_dict(target, get_model_state_dict(source))
    wanted = dict(source.named_parameters())
    assert wanted and all(value.equal(wanted[name]) for name, value in target.named_parameters())
