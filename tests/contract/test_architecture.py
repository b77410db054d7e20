"""docs/architecture.md matches the code."""

import re

import pytest

from tests.support.architecture import PACKAGES, PAGE, ROOT, committed, section

SOURCES = {
    str(path.relative_to(ROOT / "packages" / package / "src"))
    for package in PACKAGES
    for path in (ROOT / "packages" / package / "src").rglob("*.py")
}


def test_the_tree_names_every_file_and_no_other():
    assert committed()[1] == section(), "python tests/support/architecture.py --update"
    assert len(SOURCES) > 150
    names = re.findall(r"^\s+(\w+\.py) ", committed()[1], re.MULTILINE)
    assert len(names) == sum(not name.endswith("__init__.py") for name in SOURCES)


def test_every_module_says_what_it_is():
    silent = re.findall(r"^\s+(\w+(?:\.py|/))\s*$", committed()[1], re.MULTILINE)
    assert not silent


def test_every_file_of_the_drawing_exists():
    before = committed()[0]
    named = re.findall(r"[\w/]+\.py\b", before)
    assert len(named) > 15
    missing = [name for name in named if not any(source.endswith(f"/{name}") for source in SOURCES)]
    assert not missing


@pytest.mark.parametrize("name", ["targets", "scores", "selection", "loss"])
def test_a_step_is_read_in_one_file_under_150_lines(name):
    step = ROOT / "packages/cggr-core/src/cggr_core/step/run.py"
    text = step.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    assert name in text
    assert PAGE.read_text(encoding="utf-8").count("step/run.py") >= 1
