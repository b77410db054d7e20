"""Native kernel tests: a CUDA device, no interpreter; everything here is marked ``gpu``."""

import os
from pathlib import Path

import pytest
import torch

NATIVE = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"

if not NATIVE:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, and ignore torch's warnings about ``torch.compile``."""
    said = (
        "TensorFloat32 tensor cores for float32 matrix multiplication available:UserWarning",
        r"<class 'torch\.autograd\.function\.Function'> should not be:DeprecationWarning",
        "`torch.jit.script_method` is deprecated:DeprecationWarning",
        "_compile flag on create_block_mask was originally added:DeprecationWarning",  # transformers' call of it
        "The .grad attribute of a Tensor that is not a leaf Tensor is being accessed:UserWarning",  # Dynamo's, in flex
    )
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)
            for message in said:
                item.add_marker(pytest.mark.filterwarnings(f"ignore:{message}"))
