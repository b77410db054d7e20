import sys
import types

import pytest
from rich.console import Console

from cggr_train import doctor


def shown(width=160):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    doctor.show_report(console)
    console.file.close()
    return console.export_text()


def test_the_report_names_versions_devices_and_operations():
    text = shown()
    for title in ("Versions", "Devices", "Operations"):
        assert title in text
    assert doctor.versions()["torch"] in text
    assert "CPU (" in text
    served = {(op, device): by for op, device, by, _ in doctor.operations()}
    assert served["select", "cpu"] == "torch"
    assert {op for op, _ in served} >= {"difficulty", "linear_difficulty", "linear_cross_entropy", "select"}


def test_a_reason_is_given_once_for_all_operations_that_share_it(monkeypatch):
    rows = [(name, "cpu", "torch", "no kernel package") for name in ("difficulty", "select")]
    monkeypatch.setattr(doctor, "operations", lambda: [*rows, ("select", "cuda", "triton", "kernel found")])
    text = shown()
    assert text.count("no kernel package") == 1
    assert "difficulty, select" in text
    assert "kernel found" in text


def test_attention_backends_are_those_of_cggr_flash(monkeypatch):
    row = types.SimpleNamespace(name="flash_attention_9", available=False, reason="no such GPU", fix="buy one")
    module = types.SimpleNamespace(attention_backends=lambda: [row])
    monkeypatch.setitem(sys.modules, "cggr_flash", module)
    assert doctor.attention_backends() == [("flash_attention_9", False, "no such GPU", "buy one")]
    text = shown()
    assert "flash_attention_9" in text
    assert "buy one" in text


def test_without_cggr_flash_it_says_what_to_install(monkeypatch):
    installed = {name: value for name, value in doctor.versions().items() if name != "cggr-flash"}
    monkeypatch.setattr(doctor, "versions", lambda: installed)
    monkeypatch.setitem(sys.modules, "cggr_flash", None)
    text = shown()
    assert "Attention backends" not in text
    assert "./packages/cggr-flash" in text


def test_a_broken_cggr_flash_is_not_hidden(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
    with pytest.raises(ModuleNotFoundError, match="absent"):
        doctor.attention_backends()


@pytest.mark.parametrize(
    ("installed", "accelerator", "packages"),
    [
        ({}, None, ["./packages/cggr-flash"]),
        ({}, "cuda", ["./packages/cggr-kernels", "./packages/cggr-flash"]),
        ({"cggr-flash": "1", "cggr-kernels": "1"}, "cuda", []),
    ],
)
def test_advice_fits_the_machine(installed, accelerator, packages):
    assert [item.package for item in doctor.advice(installed, accelerator)] == packages


def test_versions_that_are_not_tested_are_flagged(monkeypatch):
    installed = doctor.versions() | {"transformers": "5.99.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(doctor, "versions", lambda: installed)
    text = " ".join(shown().split())
    assert "Not tested: transformers 5.99.0 is newer than the tested versions" in text
    assert "constraints.txt" in text
    monkeypatch.setattr(doctor, "versions", lambda: installed | {"transformers": "5.24.1"})
    assert "Not tested" not in shown()
