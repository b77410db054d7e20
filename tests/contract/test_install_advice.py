"""No message suggests installing this project by name alone: on the public registry, that name is another project's."""

import re

import pytest

from tests.support.documents import ROOT

SOURCES = sorted(ROOT.glob("packages/*/src/**/*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")])
# a name of this project, with or without an extra, that is no path, no file and not found among given wheels
ADVICE = re.compile(r"pip install(?:\s+--?[\w-]+)*\s+[\"'`]?cggr(?:-[a-z]+)?(?:\[[\w,-]+\])?[\"'`]?(?![\w.*-])")


@pytest.mark.parametrize("text", ["pip install cggr", "pip install 'cggr[cuda]'", "pip install --upgrade cggr-core"])
def test_what_is_advice_by_name_alone(text):
    assert ADVICE.search(text)


@pytest.mark.parametrize("text", ["pip install ./packages/cggr", "pip install --find-links dist cggr", "pip install x"])
def test_what_is_not(text):
    assert not ADVICE.search(text)


def test_no_message_and_no_page_advises_a_name_alone():
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in (*SOURCES, *PAGES)
        for match in ADVICE.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found
