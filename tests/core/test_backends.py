import logging
import sys
from functools import partial
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest
import torch

from cggr_core import backends
from cggr_core.backends import _Registry, register_reference, report, resolve


def reference(x):
    return x


def kernel(x):
    return x + 1


def broken():
    raise ImportError("no libcuda")


def registry(wanted="auto", sources=None):
    made = _Registry(wanted, sources or {})
    made.references["op"] = reference
    return made


def test_the_ops_of_this_package_have_references():
    ops = {row.op for row in report()}
    assert {"difficulty", "linear_difficulty", "linear_cross_entropy", "select"} <= ops
    assert all(row.reason for row in report())


def test_auto_prefers_a_kernel_for_that_device_type_only():
    made = registry(sources={"triton": lambda: {("op", "cuda"): kernel}})
    assert made.resolve("op", "cuda") is kernel
    assert made.resolve("op", "cpu") is reference
    rows = {(row.op, row.device_type): row for row in made.report()}
    assert rows["op", "cuda"].backend == "triton"
    assert rows["op", "cpu"].backend == "torch"
    assert "no installed backend has 'op' for device type 'cpu'" in rows["op", "cpu"].reason


def test_falling_back_is_logged_once(caplog):
    made = registry()
    with caplog.at_level(logging.INFO, logger="cggr_core.backends"):
        made.resolve("op", "cpu")
        made.resolve("op", "cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "op on cpu runs in torch: no kernel package is installed (python -m pip install ./packages/cggr-kernels in a "
        "checkout, or the wheel of cggr-kernels)"
    ]


def test_a_backend_that_fails_to_load_is_a_reason_not_a_crash():
    made = registry(sources={"triton": broken})
    assert made.resolve("op", "cpu") is reference
    assert "backend 'triton' is not available: ImportError: no libcuda" in made.report()[0].reason


def test_torch_is_the_reference_even_where_there_is_a_kernel():
    made = registry("torch", {"triton": lambda: {("op", "cpu"): kernel}})
    assert made.resolve("op", "cpu") is reference
    assert made.report()[0].reason == "CGGR_BACKEND=torch"


def test_an_explicit_request_that_cannot_be_met_raises_with_the_reason():
    made = registry("triton", {"triton": broken})
    with pytest.raises(
        RuntimeError, match=r"CGGR_BACKEND=triton, but 'op' on 'cpu' has no Triton kernel: .*no libcuda"
    ):
        made.resolve("op", "cpu")
    assert made.report()[0].backend == "none"


def test_unknown_names():
    with pytest.raises(ValueError, match=r"CGGR_BACKEND must be one of .*did you mean 'triton'"):
        _Registry("tritn", {})
    with pytest.raises(ValueError, match="no implementation of op 'nothing'"):
        resolve("nothing", "cpu")


def test_float64_always_runs_the_reference(monkeypatch):
    made = registry(sources={"triton": lambda: {("op", "cpu"): kernel}})
    monkeypatch.setattr(backends, "_registry", made)
    assert resolve("op", "cpu", torch.float32) is kernel
    assert resolve("op", "cpu", torch.float64) is reference
    register_reference("other", kernel)
    assert resolve("other", "cpu") is kernel


def test_an_installed_backend_may_say_why_it_offers_nothing(monkeypatch):
    module = ModuleType("some_kernels")
    module.BACKEND = {}
    monkeypatch.setitem(sys.modules, "some_kernels", module)
    entry = EntryPoint("triton", "some_kernels:BACKEND", "cggr.backends")
    made = registry(sources={"triton": partial(backends._load, entry)})
    assert made.report()[0].reason == "backend 'triton' is not available: it has no kernel for this machine"
    module.REASON = "this PyTorch is built without CUDA"
    made = registry(sources={"triton": partial(backends._load, entry)})
    assert made.report()[0].reason == "backend 'triton' is not available: this PyTorch is built without CUDA"
    module.BACKEND = {("op", "cpu"): kernel}
    assert registry(sources={"triton": partial(backends._load, entry)}).resolve("op", "cpu") is kernel
