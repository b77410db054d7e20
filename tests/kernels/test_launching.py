"""Launches that skip Triton's search: a stand-in for Triton's function counts searches and keeps what is launched."""

from typing import Any

import pytest
import torch

import cggr_kernels._launching as launching
from cggr_kernels._launching import Launch, descriptor

ROWS = torch.arange(40.0)


class Compiled:
    def __init__(self, launched: list[Any]) -> None:
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *args: self.launched.append((grid, args))


class Kernel:
    """Compile-time arguments come last, in this order."""

    arg_names = ("x_ptr", "count", "BLOCK", "FLAG")

    def __init__(self) -> None:
        self.searches: list[Any] = []
        self.launched: list[Any] = []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.searches.append((grid, args, constants))
            return Compiled(self.launched)

        return launch


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    monkeypatch.setattr(launching, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return Kernel()


def test_a_second_launch_is_direct_and_in_the_kernels_order(kernel):
    launch = Launch(kernel)
    launch(3, ROWS, 7, FLAG=True, BLOCK=16, num_warps=4)
    assert kernel.searches == [((3,), (ROWS, 7), {"FLAG": True, "BLOCK": 16, "num_warps": 4})]
    other = torch.ones(40)
    launch(5, other, 7, FLAG=True, BLOCK=16, num_warps=4)
    assert len(kernel.searches) == 1
    ((grid, args),) = kernel.launched
    assert grid == (5, 1, 1)
    assert args[0] is other
    assert args[1:] == (7, 16, True)


@pytest.mark.parametrize(
    ("args", "constants"),
    [
        ((ROWS, 8), {}),
        ((ROWS.half(), 7), {}),
        ((ROWS[1:], 7), {}),
        ((ROWS, 7), {"BLOCK": 32}),
        ((ROWS, 7), {"FLAG": False}),
        ((ROWS, 7), {"num_warps": 8}),
    ],
    ids=["integer", "dtype", "alignment", "block", "flag", "warps"],
)
def test_what_triton_specialises_for_is_searched_anew(args, constants, kernel):
    launch = Launch(kernel)
    usual = {"BLOCK": 16, "FLAG": True, "num_warps": 4}
    launch(3, ROWS, 7, **usual)
    launch(3, *args, **(usual | constants))
    assert len(kernel.searches) == 2
    launch(3, *args, **(usual | constants))
    launch(3, ROWS, 7, **usual)
    assert len(kernel.searches) == 2
    assert [constants.get("BLOCK", 16), 16] == [args[2] for _, args in kernel.launched]


def test_another_device_has_kernels_of_its_own(kernel, monkeypatch):
    launch = Launch(kernel)
    launch(3, ROWS, 7, BLOCK=16, FLAG=True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    launch(3, ROWS, 7, BLOCK=16, FLAG=True)
    assert len(kernel.searches) == 2


def test_descriptors_are_told_apart_by_dtype_and_block(kernel):
    launch = Launch(kernel)
    x = torch.randn(8, 16)
    for block in ((2, 16), (4, 16), (2, 16)):
        launch(3, descriptor(x, *block), 7, BLOCK=16, FLAG=True)
    launch(3, descriptor(x.half(), 2, 16), 7, BLOCK=16, FLAG=True)
    assert [args[0].block_shape for _, args, _ in kernel.searches] == [[2, 16], [4, 16], [2, 16]]
    assert len(kernel.launched) == 1


def test_kernels_kept_are_bounded(kernel):
    launch = Launch(kernel)
    for count in range(launching._MOST_KINDS + 5):
        launch(3, ROWS, count, BLOCK=16, FLAG=True)
    assert len(launch._compiled) <= launching._MOST_KINDS


def test_a_descriptor_is_what_triton_makes():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = torch.randn(3, 8, 16)
    made, expected = descriptor(x, 1, 4, 16), TensorDescriptor.from_tensor(x, [1, 4, 16])
    assert type(made) is TensorDescriptor
    assert made.base is x
    for name in ("shape", "strides", "block_shape"):
        assert list(getattr(made, name)) == list(getattr(expected, name))
    assert made.padding == expected.padding
