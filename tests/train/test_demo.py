import json

import pytest

from cggr_train.demo import HELDOUT_EVERY, choose_passage, write_corpus
from cggr_train.demo.corpus import standard_library
from cggr_train.errors import InputError


def test_the_corpus_is_the_standard_library_each_file_once():
    texts = standard_library(max_characters=300_000)
    assert 300_000 <= sum(map(len, texts)) < 2_000_000
    assert len(set(texts)) == len(texts)
    assert standard_library(max_characters=300_000) == texts
    assert texts == standard_library(max_characters=600_000)[: len(texts)], "a larger corpus goes on from the smaller"


def test_the_corpus_leaves_out_copies_tests_and_installed_packages(tmp_path):
    line = "value = 'something long enough'\n"
    for name, text in {
        "a.py": "a" + line * 10, "copy.py": "a" + line * 10, "short.py": "x = 1\n", "notes.txt": line * 10,
        "test/b.py": "b" + line * 10, "site-packages/c.py": "c" + line * 10, "pkg/d.py": "d" + line * 10,
    }.items():  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" * 100)
    assert sorted(text[0] for text in standard_library(max_characters=10**6, root=tmp_path)) == ["a", "d"]
    with pytest.raises(InputError, match="no Python source under"):
        standard_library(max_characters=10, root=tmp_path / "test" / "none")


def test_the_corpus_is_written_in_two_parts_that_share_no_file(tmp_path):
    train, heldout = (
        [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        for path in write_corpus(tmp_path, max_characters=500_000)
    )
    texts = standard_library(max_characters=500_000)
    assert sorted([*train, *heldout]) == sorted(texts)
    assert heldout == texts[::HELDOUT_EVERY]


def test_a_passage_starts_at_a_definition():
    text = "x = 1\n" * 50 + "\ndef late(self):\n    pass\n" * 80
    assert choose_passage(["short", text]).startswith("def late(self):")
    assert choose_passage(["one line"]) == "one line"
