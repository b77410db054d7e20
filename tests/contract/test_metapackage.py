"""`from cggr import ...` gives the names of `cggr_core`, and errors for optional names say what to install."""

import subprocess
import sys
from importlib import import_module

import pytest

import cggr
import cggr_core

PUBLIC = (
    "CGGRLinearLoss",
    "CGGRLoss",
    "CGGRModel",
    "CGGRScorer",
    "Selection",
    "create_truncated_router",
)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_those_of_core(name):
    assert getattr(cggr, name) is getattr(cggr_core, name)
    assert name in cggr.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'cggr' has no attribute 'nonsense'"):
        cggr.nonsense  # noqa: B018


def test_an_optional_name_is_looked_up_when_used(monkeypatch):
    monkeypatch.setitem(cggr._OPTIONAL, "linspace", "torch")
    import torch

    assert cggr.linspace is torch.linspace


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(cggr._OPTIONAL, "absent", "cggr_absent")
    wanted = (
        r"cggr\.absent comes from the package cggr-absent, which is not installed: python -m pip install "
        r"\./packages/cggr-absent in a checkout of this project, or install its wheel \(cggr_absent-\*\.whl\)$"
    )
    with pytest.raises(ImportError, match=wanted):
        from cggr import absent  # noqa: F401


@pytest.mark.parametrize(
    ("module", "name"), [("cggr_moe", "PersistentTRMLP"), ("cggr_moe", "create_persistent_tr_mlp")]
)
def test_optional_names_are_those_of_their_package(module, name):
    assert getattr(cggr, name) is getattr(import_module(module), name)


@pytest.mark.parametrize("package", ["cggr", "cggr_train"])
def test_importing_a_package_leaves_slow_modules_alone(package):
    """Dynamo takes a second to import; transformers and the plots take several."""
    slow = ("torch._dynamo", "transformers", "matplotlib", "datasets")
    code = f"import sys, {package}; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
