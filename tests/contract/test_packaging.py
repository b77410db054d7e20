"""What a user of the built distributions relies on: names, versions, ranges, extras, files."""

import importlib
import re
import tomllib
from importlib.metadata import distribution, entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cggr_train.tested_versions import TESTED, verdict

ROOT = Path(__file__).parents[2]
VERSIONS = {
    "cggr": "0.6.0",
    "cggr-core": "0.1.0",
    "cggr-kernels": "0.1.0",
    "cggr-flash": "0.1.0",
    "cggr-moe": "0.1.0",
    "cggr-train": "0.1.0",
}
MODULES = {
    "cggr-core": {"torch>=2.11"},
    "cggr-kernels": {"torch>=2.11", "triton>=3.6", "triton-windows>=3.6"},
    "cggr-flash": {"safetensors>=0.8", "torch>=2.11", "transformers>=5.17"},
    "cggr-moe": {"cggr-core<0.2,>=0.1", "torch>=2.11"},
    "cggr": {"cggr-core<0.2,>=0.1"},
}

every_package = pytest.mark.parametrize("package", VERSIONS)


def folder(package: str) -> Path:
    return ROOT / "packages" / package


def project(package: str) -> dict:
    return tomllib.loads((folder(package) / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def required(package: str, extra: str | None = None) -> list[Requirement]:
    """Requirements of the installed distribution: its own, or those that an extra adds."""
    found = [Requirement(text) for text in distribution(package).requires or ()]
    in_extra = [requirement for requirement in found if re.search(r"\bextra\b", str(requirement.marker))]
    if extra is None:
        return [requirement for requirement in found if requirement not in in_extra]
    return [r for r in in_extra if r.marker is not None and r.marker.evaluate({"extra": extra})]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@every_package
def test_versions_agree(package):
    assert project(package)["version"] == VERSIONS[package]
    assert version(package) == VERSIONS[package]
    assert importlib.import_module(package.replace("-", "_")).__version__ == VERSIONS[package]


@every_package
def test_metadata(package):
    metadata = distribution(package).metadata
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Summary"]


@every_package
def test_each_distribution_carries_its_files(package):
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert (folder(package) / "LICENSE").read_text(encoding="utf-8") == licence
    assert (folder(package) / "src" / package.replace("-", "_") / "py.typed").is_file()
    assert "towncrier release notes start" in (folder(package) / "CHANGELOG.md").read_text(encoding="utf-8")
    assert (folder(package) / "changelog.d").is_dir()


@pytest.mark.parametrize(("package", "expected"), MODULES.items())
def test_dependencies(package, expected):
    assert {requirement.name + str(requirement.specifier) for requirement in required(package)} == expected


@pytest.mark.parametrize(
    ("system", "expected"), [("Linux", {"triton"}), ("Windows", {"triton-windows"}), ("Darwin", set())]
)
def test_the_cuda_extra_brings_the_triton_of_the_platform(system, expected):
    (kernels,) = (r for r in required("cggr", "cuda") if r.name == "cggr-kernels")
    brought = [r for r in required(kernels.name) if r.marker is None or r.marker.evaluate({"platform_system": system})]
    assert {requirement.name for requirement in brought} == {"torch"} | expected


@every_package
def test_siblings_are_required_by_range(package):
    siblings = [r for r in map(Requirement, distribution(package).requires or ()) if r.name.startswith("cggr")]
    for sibling in siblings:
        assert {(part.operator, part.version) for part in sibling.specifier} == {(">=", "0.1"), ("<", "0.2")}
        assert sibling.specifier.contains(VERSIONS[sibling.name])


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("cuda", {"cggr-kernels", "cggr-moe"}),
        ("flash", {"cggr-flash"}),
        ("moe", {"cggr-moe"}),
        ("train", {"cggr-train"}),
        ("all", {"cggr-kernels", "cggr-flash", "cggr-moe", "cggr-train"}),
    ],
)
def test_extras_of_the_metapackage(extra, expected):
    assert {requirement.name for requirement in required("cggr", extra)} == expected


@pytest.mark.parametrize("package", ["cggr-core", "cggr-moe"])
def test_transformers_is_an_option(package):
    assert [str(r.specifier) for r in required(package, "transformers")] == [">=5.17"]


def test_entry_points():
    assert [(e.name, e.value) for e in entry_points(group="cggr.backends")] == [
        ("triton", "cggr_kernels.backend:BACKEND")
    ]
    assert [e.value for e in entry_points(group="console_scripts", name="cggr")] == ["cggr_train.cli:main"]


@every_package
def test_constraints_pin_every_direct_dependency_within_its_range(package):
    pinned = pins()
    for requirement in map(Requirement, distribution(package).requires or ()):
        if not requirement.name.startswith("cggr"):
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_tested_versions_span_what_is_asked_for_and_what_is_pinned():
    asked = {
        r.name: r.specifier for package in VERSIONS for r in [*required(package), *required(package, "transformers")]
    }
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    for package in ("torch", "transformers"):
        oldest = TESTED[package].oldest
        assert str(asked[package]) == f">={oldest}"
        assert f'"{package}=={oldest}.0"' in noxfile
    for package in TESTED:
        assert verdict(package, pins()[package]) == "tested"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("5.16.9", "older than the tested versions (5.17 to 5.24)"),
        ("5.17.0.dev0", "tested"),
        ("5.24.3", "tested"),
        ("5.25.0", "newer than the tested versions (5.17 to 5.24)"),
        ("6.0", "newer than the tested versions (5.17 to 5.24)"),
    ],
)
def test_versions_outside_the_tested_ones_are_named(version, said):
    assert verdict("transformers", version) == said
