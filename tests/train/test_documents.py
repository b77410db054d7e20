import json

import pyarrow
import pyarrow.parquet
import pytest

from cggr_train.data import Documents
from cggr_train.errors import InputError


def test_formats_are_told_by_the_suffix_and_read_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three", "four"], "other": [1, 2]}), tmp_path / "c.parquet")
    documents = Documents([tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.parquet"])
    assert list(documents) == ["plain", "one", "two", "three", "four"]
    assert list(documents) == ["plain", "one", "two", "three", "four"], "a second iteration reads anew"


def test_fields_are_joined(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"question": "Q?", "answer": "A."}))
    assert list(Documents([path], field="question, answer")) == ["Q?\nA."]


def test_empty_texts_are_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n{"text": "x"}')
    assert list(Documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"bad\.jsonl, line 3: not JSON"),
        ("[1, 2]", r"bad\.jsonl, line 3: expected an object with text, got a list"),
        ('{"body": "x"}', r"bad\.jsonl, line 3: 'text' should be text, got no such key \(it has body; see --field\)"),
        ('{"text": "half \\ud83d"}', r"bad\.jsonl, line 3: half a surrogate pair \('.ud83d'\), which is not a char"),
        ('{"text": ' + "9" * 5000 + "}", r"bad\.jsonl, line 3: not JSON"),
        ("[" * 100_000, r"bad\.jsonl, line 3: not JSON"),
        ('{"text": 5}', r"bad\.jsonl, line 3: 'text' should be text, got a number"),
    ],
)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "one"}}\n\n{line}\n{{"text": "two"}}\n')
    with pytest.raises(InputError, match=message):
        list(Documents([path]))
    documents = Documents([path], skip_bad=True)
    assert list(documents) == ["one", "two"]
    assert documents.skipped == 1


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_named(tmp_path, encoding):
    path = tmp_path / "wide.jsonl"
    path.write_bytes(("\ufeff" + '{"text": "one"}\n').encode(encoding))
    with pytest.raises(InputError, match=r"wide\.jsonl is UTF-16 text; save it as UTF-8"):
        list(Documents([path], skip_bad=True))


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9 au lait")
    with pytest.raises(InputError, match=r"latin\.txt: not UTF-8 text \(byte 3"):
        list(Documents([path]))
    assert list(Documents([path], skip_bad=True)) == []
    line = tmp_path / "latin.jsonl"
    line.write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl, line 1: not JSON"):
        list(Documents([line]))


def test_a_byte_order_mark_is_no_text(tmp_path):
    for name, content in (("a.txt", "one"), ("b.jsonl", '{"text": "two"}\n')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert list(Documents([tmp_path / "a.txt", tmp_path / "b.jsonl"])) == ["one", "two"]


def test_a_field_is_named_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"answer": "a"}\n')
    with pytest.raises(InputError, match="--field must name each key once, got 'answer,answer'"):
        Documents([tmp_path / "a.jsonl"], field="answer,answer")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jsonl.gz", "is compressed; unpack it"),
        ("a.JSON", "is JSON: convert it"),
        ("a.csv", "is a table: convert it"),
    ],
)
def test_kinds_that_would_be_read_as_something_else(tmp_path, name, message):
    (tmp_path / name).write_text('[{"text": "one"}]')
    with pytest.raises(InputError, match=message):
        Documents([tmp_path / name])


def test_a_parquet_file_that_is_damaged_inside(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"one", b"\xff\xfe"]}), path)
    table = pyarrow.parquet.read_table(path)
    broken = pyarrow.table({"text": pyarrow.Array.from_buffers(pyarrow.string(), 2, table["text"].chunk(0).buffers())})
    pyarrow.parquet.write_table(broken, path)
    with pytest.raises(InputError, match=r"a\.parquet is damaged after row 0 \(.*utf-8"):
        list(Documents([path]))


def test_missing_file_folder_and_nothing_at_all(tmp_path):
    with pytest.raises(InputError, match=r"no\.txt does not exist"):
        Documents([tmp_path / "no.txt"])
    with pytest.raises(InputError, match="is a directory; give the files in it"):
        Documents([tmp_path])
    with pytest.raises(InputError, match="no data files were given"):
        Documents([])
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"--field must be the key or column .*, got ' ,'"):
        Documents([tmp_path / "a.txt"], field=" ,")


def test_unreadable_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x")
    documents = Documents([path])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_text", refuse)
    with pytest.raises(InputError, match=r"a\.txt cannot be read: Permission denied"):
        list(documents)


def test_parquet_without_the_column_and_not_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), path)
    with pytest.raises(InputError, match="no column 'text'; its columns are body"):
        list(Documents([path]))
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="is not a Parquet file"):
        list(Documents([path]))


def test_parquet_null_is_named_with_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), path)
    with pytest.raises(InputError, match=r"a\.parquet, row 2: 'text' should be text, got null"):
        list(Documents([path]))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_first_line_shows_a_wrong_field_before_the_rest_is_read(tmp_path, name):
    import pyarrow.parquet

    path = tmp_path / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"question": ["one", "two"]}), path)
    else:
        path.write_text('{"question": "one"}\n{"question": "two"}\n')
    with pytest.raises(InputError, match=r"'?answer'?.*question"):
        Documents([path], field="answer").check_first()
    Documents([path], field="question").check_first()


def test_only_the_first_line_is_read_and_text_is_not(tmp_path):
    later = tmp_path / "later.jsonl"
    later.write_text('{"text": "one"}\nnot JSON\n')
    documents = Documents([later], skip_bad=True)
    documents.check_first()
    assert documents.skipped == 0
    raw = tmp_path / "raw.txt"
    raw.write_bytes(b"\xff\xfe\x00")
    Documents([raw]).check_first()
