"""What a loss may read: which values a change can be seen of, how they are compared, and where they are looked for."""

import copy
import functools

import pytest
import torch
from torch import nn

from cggr_core.routing.loss_state import places, readable, snapshot


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("value", [True, 3, 2.5, "mean", None, [1, "a"], (), {"a": 1}, {1, 2}, [torch.ones(2), None]])
def test_plain_values_and_small_containers_of_them_are_readable(value):
    assert readable(value)


@pytest.mark.parametrize(
    "value",
    [
        object(),
        [object()],
        [1, object()],
        {"a": object()},
        {object(): 1},
        [[1]],
        nn.Linear(1, 1),
        print,
        frozenset((1,)),
    ],
)
def test_other_values_are_not_readable(value):
    assert not readable(value)


def test_tensors_that_are_trained_and_large_containers_are_not_readable():
    assert readable(torch.ones(2)) and readable(torch.ones(1000)) and not readable(torch.ones(2, requires_grad=True))
    assert readable([0] * 64) and not readable([0] * 65)
    assert readable({n: n for n in range(64)}) and not readable({n: n for n in range(65)})


@pytest.mark.parametrize("size", [1, 64])
def test_a_small_tensor_is_compared_by_its_values(size):
    tensor = torch.full((size,), torch.nan)
    before = snapshot(tensor)
    assert before == snapshot(tensor) == snapshot(tensor.clone()) != snapshot(tensor.double())
    tensor.data[0] = 1.0  # counts no version
    assert before != snapshot(tensor)


@pytest.mark.parametrize("make", [lambda: torch.ones(65), lambda: torch.ones(2).as_subclass(Subclass), lambda: META])
def test_other_tensors_are_compared_by_what_was_written_to_them(make):
    tensor = make()
    before = snapshot(tensor)
    assert before == snapshot(tensor) != snapshot(tensor.clone())
    tensor.add_(1)
    assert before != snapshot(tensor)
    assert before != 3 and before != "a"


META = torch.ones(2, device="meta")


def test_a_tensor_that_is_gone_equals_nothing():
    tensor = torch.ones(65)
    before, again = snapshot(tensor), snapshot(tensor)
    assert before == again
    del tensor
    assert before != again


def test_a_tensor_of_inference_mode_has_no_versions():
    with torch.inference_mode():
        tensor = torch.ones(65)
    assert snapshot(tensor) == snapshot(tensor)


def test_containers_are_compared_as_they_were():
    held = {"a": [1]}, [1, torch.ones(2)], {3, 1}
    before = [snapshot(value) for value in (held[0]["a"], held[1], held[2])]
    assert before == [snapshot(value) for value in (held[0]["a"], held[1], held[2])]
    held[0]["a"].append(2)
    held[1][1][0] = 5.0
    held[2].add(7)
    assert all(old != snapshot(value) for old, value in zip(before, (held[0]["a"], held[1], held[2]), strict=True))
    assert snapshot({2, 1}) == snapshot({1, 2}) == {1, 2} and snapshot((1, 2)) == [1, 2]


class Model(nn.Module):
    def forward(self, x, scale=2.0, *, shift=0.0):
        return x * scale + shift + GLOBAL


GLOBAL = 1.0


class Options:
    def __init__(self):
        self.gamma = 1.0


class Slotted:
    __slots__ = ("gamma",)


class Called:
    def __call__(self, logits, labels, smoothing=0.1):
        return logits.sum() * smoothing


def reads(base=None, parts=(), losses=()):
    """All names and values that are looked at, without those of modules themselves."""
    found = [function() for function in places(Model() if base is None else base, parts, losses).values()]
    return {name: value for values in found for name, value in values.items()}


def test_a_forward_reads_its_defaults_and_globals():
    assert reads().items() >= {"0": 2.0, "shift": 0.0, "GLOBAL": 1.0}.items()
    model = Model()

    def replaced(x, factor=4.0):
        return x * factor

    model.forward = replaced
    assert reads(model)["0"] == 4.0


@pytest.mark.parametrize("kind", ["function", "method", "partial", "callable", "module"])
def test_a_loss_function_reads_what_it_was_made_with(kind):
    options, late = Options(), None

    def function(logits, labels, smoothing=0.1, *, weight=0.5):
        return logits.sum() * options.gamma * (late or weight)

    class Methods(Options):
        def loss(self, logits, labels, smoothing=0.1):
            return logits.sum() * self.gamma * smoothing

    class Criterion(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(1, 1)
            self.inner.register_buffer("smoothing", torch.tensor(0.1))

    owner = Methods()
    loss, wanted = {
        "function": (function, {"0": 0.1, "weight": 0.5, "options": options, "late": None, "gamma": 1.0}),
        "method": (owner.loss, {"0": 0.1, "self": owner, "gamma": 1.0}),
        "partial": (functools.partial(function, 1, labels=3), {"0": 0.1, "labels": 3, "weight": 0.5, "gamma": 1.0}),
        "callable": (Called(), {"0": 0.1}),
        "module": (Criterion(), {"smoothing": torch.tensor(0.1)}),
    }[kind]
    found = reads(nn.Identity(), losses=[loss])
    assert {name: found.get(name) for name in wanted} == wanted


def test_a_variable_that_is_not_yet_assigned_reads_as_none():
    def made():
        def loss(logits, labels):
            return logits.sum() * later

        found = reads(losses=[loss])
        later = 3.0
        return found, reads(losses=[loss]), later

    before, after, later = made()
    assert before["later"] is None and after["later"] == later


@pytest.mark.parametrize("home", ["transformers.x", "torch.x", "peft.x", "accelerate.x", "builtins", "numpy.x", "own"])
def test_objects_of_libraries_are_not_looked_into(home):
    kind = type("Kind", (Options,), {"__module__": home})
    model = Model()
    model.options = kind()
    assert ("gamma" in reads(model)) is (home == "own")


def test_what_has_no_attributes_of_its_own_is_not_looked_into():
    model = Model()
    model.slotted, model.kind, model.tensor = Slotted(), Options, torch.ones(2).as_subclass(Subclass)
    model.tensor.gamma = 1.0
    Options.gamma = 2.0
    try:
        assert "gamma" not in reads(model)
    finally:
        del Options.gamma


def test_keys_of_places_stay_the_same():
    model, loss = Model(), Called()
    first, second = places(model, (), [loss]), places(model, (), [loss])
    assert first.keys() == second.keys() != places(copy.deepcopy(model), (), [loss]).keys()
