import json

import pytest

from cggr_train.demo import HELDOUT_EVERY, announcement, choose_passage, write_corpus
from cggr_train.demo.corpus import standard_library
from cggr_train.errors import InputError
from cggr_train.settings import TrainSettings
from cggr_train.study import StudySettings


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


def test_it_says_what_it_will_do_how_long_it_takes_and_what_equal_cost_means():
    train = TrainSettings(data=("a",), config="nano", seconds=20.0, batch_size=16)
    text = announcement(StudySettings(train=train, equal=("time",), controls=("equal_cost",)), workers=2)
    assert text.startswith("About 4 minutes: 5 ways to train (arms), 3 seeds each, 15 runs of 20 s, 2 at a time.")
    for words in ("standard, batch 16: every token", "random 0.25, kv: that share", "stratified 0.25", "CGGR"):
        assert words in text
    assert "0.50 of the standard step's operations with random tokens and 0.58 with scores" in text
    assert "so the batch of 16 shrinks to 8 and 9" in text
