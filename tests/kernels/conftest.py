"""Where the kernel tests run: on CPU under ``TRITON_INTERPRET=1``, or on a CUDA device."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter makes scalars of one-element arrays; torch.compile makes instances of autograd functions."""
    messages = (
        "Conversion of an array with ndim",
        r"<class 'torch\.autograd\.function\.Function'> should not be",
        "`torch.jit.script_method` is deprecated",  # of what torch.compile imports
    )
    # Said by torch.compile on devices that could multiply float32 faster and less exactly.
    unasked = "TensorFloat32 tensor cores for float32 matrix multiplication available"
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            # 0 * -inf is computed on purpose, and looked for.
            item.add_marker(pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"))
            item.add_marker(pytest.mark.filterwarnings(f"ignore:{unasked}:UserWarning"))
            for message in messages:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning"))


@pytest.fixture
def device() -> str:
    """The device that the kernels run on here."""
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def compiler(device: str) -> str:
    """Backend of ``torch.compile``: code generation for the CPU is not what these tests are about."""
    return "inductor" if device == "cuda" else "aot_eager"
