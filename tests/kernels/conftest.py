"""Where the kernel tests run: on CPU under ``TRITON_INTERPRET=1``, or on a CUDA device."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter converts one-element arrays to scalars, which numpy deprecates."""
    ignore = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(ignore)


@pytest.fixture
def device() -> str:
    """The device that the kernels run on here."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def compiler(device: str) -> str:
    """Backend of ``torch.compile``: code generation for the CPU is not what these tests are about."""
    return "inductor" if device == "cuda" else "aot_eager"
