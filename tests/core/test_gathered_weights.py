"""When weights that FSDP2 shards stay gathered between two passes, with stand-ins for its layers and groups."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from cggr_core.routing import sharding
from cggr_core.routing.sharding import GatheredWeights, bytes_when_gathered, shards_layers


class Sharded(nn.Linear):
    """A layer as ``fully_shard`` leaves it: with a group of parameters, in the place of either torch."""

    def __init__(self, *, several: bool = True, param_dtype: torch.dtype | None = None) -> None:
        super().__init__(3, 2)
        self.resharded = 0
        self.group = SimpleNamespace(
            post_forward_mesh_info="resharded",
            mp_policy=SimpleNamespace(param_dtype=param_dtype),
            fsdp_params=[SimpleNamespace(sharded_param=parameter) for parameter in self.parameters()],
        )
        self.state = {"_fsdp_param_groups": [self.group]} if several else {"_fsdp_param_group": self.group}

    def set_reshard_after_backward(self, reshard: bool) -> None:
        raise AssertionError(reshard)

    def reshard(self) -> None:
        self.resharded += 1

    def _get_fsdp_state(self) -> Any:
        return SimpleNamespace(**self.state)


def layers(*, several: bool = True) -> list[nn.Module]:
    return [Sharded(several=several), nn.Linear(2, 2), Sharded(several=several)]


def held(made: list[nn.Module]) -> list[bool]:
    """Whether each sharded layer stays gathered after a forward."""
    return [layer.group.post_forward_mesh_info is None for layer in made if isinstance(layer, Sharded)]


def step(weights: GatheredWeights, made: list[nn.Module], *, finished: bool = True) -> list[bool]:
    with weights.step():
        with weights.context_pass():
            found = held(made)
        assert held(made) == [False, False]
        if finished:
            weights.after_gradient_pass()
    return found


def test_layers_are_sharded_where_one_is() -> None:
    assert shards_layers(layers()) is True
    assert shards_layers([nn.Linear(2, 2)]) is False


@pytest.mark.parametrize("several", [False, True])
def test_weights_stay_gathered_from_the_third_step_on(several: bool) -> None:
    made = layers(several=several)
    weights = GatheredWeights(made)
    assert [step(weights, made) for _ in range(5)] == [[False, False]] * 2 + [[True, True]] * 3
    with weights.context_pass():
        assert held(made) == [False, False], "outside of a step nothing follows"
    assert [layer.resharded for layer in made if isinstance(layer, Sharded)] == [0, 0]


def test_room_is_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(sharding, "_memory_suffices", lambda layers, device: asked.append(device.type))
    made = layers()
    weights = GatheredWeights(made)
    assert [step(weights, made) for _ in range(5)] == [[False, False]] * 5
    assert asked == ["cpu"]


def test_one_rank_without_room_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def largest(value: torch.Tensor) -> torch.Tensor:
        told.append((value.item(), value.dtype))
        return torch.ones_like(value)

    monkeypatch.setattr(sharding, "largest_over_ranks", largest)
    made = layers()
    weights = GatheredWeights(made)
    assert [step(weights, made) for _ in range(4)] == [[False, False]] * 4
    assert told == [(0, torch.int32)]


def test_what_was_left_gathered_is_resharded_once() -> None:
    made = layers()
    weights = GatheredWeights(made)
    resharded = lambda: [layer.resharded for layer in made if isinstance(layer, Sharded)]  # noqa: E731
    for _ in range(2):
        step(weights, made, finished=False)
    assert resharded() == [0, 0], "nothing was held yet"
    step(weights, made, finished=False)
    assert resharded() == [1, 1]
    with weights.step():
        pass
    assert resharded() == [1, 1]
    with pytest.raises(KeyError), weights.step(), weights.context_pass():
        raise KeyError
    assert resharded() == [2, 2]
    with weights.step(), weights.step():
        with weights.context_pass():
            assert held(made) == [True, True]
        with weights.context_pass():
            pass
    assert resharded() == [3, 3]


def test_a_step_inside_a_step_is_part_of_it() -> None:
    made = layers()
    weights = GatheredWeights(made)
    for _ in range(2):
        step(weights, made)
    with weights.step():
        with weights.step():
            pass
        with weights.context_pass():
            assert held(made) == [True, True]


def test_layers_that_are_not_sharded_take_no_steps() -> None:
    plain: list[nn.Module] = [nn.Linear(2, 2)]
    weights = GatheredWeights(plain)
    for _ in range(4):
        with weights.step(), weights.context_pass():
            assert weights._steps == 0
            assert not weights._in_step


@pytest.mark.parametrize(("kind", "free", "suffices"), [("cuda", 90, True), ("cuda", 89, False), ("xpu", 900, False)])
def test_a_tenth_of_the_memory_is_left(kind: str, free: int, suffices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [Sharded(param_dtype=torch.bfloat16), Sharded()]
    assert bytes_when_gathered(made) == 8 * 2 + 8 * 4
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(device), (free, 420))[1])
    assert sharding._memory_suffices(made, torch.device(kind)) is suffices
    assert len(asked) == (kind == "cuda")
    assert sharding._memory_suffices(made, torch.device("cpu")) is True


def test_groups_of_layers_without_a_state() -> None:
    made = Sharded()
    made.state = {}
    assert sharding._groups([made, nn.Linear(2, 2)]) == []
    assert sharding._groups([nn.Sequential(Sharded(), Sharded())])[1].post_forward_mesh_info == "resharded"
