"""The measuring and writing that benchmarks share, and the format of the results in the repository."""

import json
import re
from fnmatch import fnmatch

import pytest

from benchmarks import _record
from tests.support.documents import DOCUMENTS, ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
TEXTS = [path.read_text(encoding="utf-8") for path in DOCUMENTS]


def test_summary_by_hand():
    assert _record.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "spread": [2.0, 4.0], "samples": 5}
    assert _record.summary([7.0]) == {"median": 7.0, "spread": [7.0, 7.0], "samples": 1}
    with pytest.raises(ValueError, match="samples is empty"):
        _record.summary([])


@pytest.mark.parametrize("in_a_row", [1, 3])
def test_candidates_take_turns_and_warm_up(in_a_row):
    calls = []
    candidates = {"one": lambda: calls.append("one"), "two": lambda: calls.append("two")}
    rows = _record.measure(candidates, control="one", repeats=3, warmup=1, calls=in_a_row)
    assert calls == (["one"] * in_a_row + ["two"] * in_a_row) * 4
    assert rows["two"]["samples"] == rows["two"]["ratio"]["samples"] == 3
    assert rows["one"]["ratio"]["median"] == 1.0


def test_written_results_are_whole_and_read_back(tmp_path):
    rows = {"standard": _record.summary([2.0]) | {"unit": "s"}}
    path = _record.write("step", rows, settings={"seed": 0}, control="standard", folder=tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["step.json"] == [path.name]
    result = _record.load("step", folder=tmp_path)
    assert result["rows"] == rows
    assert {"date", "commit", "python", "versions", "device", "threads"} <= result["environment"].keys()
    _record.plot(result, tmp_path / "step.png")
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_write_leaves_the_earlier_result(tmp_path):
    settings = {"seed": 0}
    _record.write("step", {"a": {"median": 1.0}}, settings=settings, control="a", folder=tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        _record.write("step", {"a": {"median": float("nan")}}, settings=settings, control="a", folder=tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == ["step.json"]
    assert _record.load("step", folder=tmp_path)["rows"]["a"]["median"] == 1.0


@pytest.mark.parametrize(
    ("settings", "control", "message"),
    [({"seed": 0}, "absent", "control is 'absent'"), ({}, "a", "settings has no 'seed'")],
)
def test_a_result_needs_its_control_and_seed(tmp_path, settings, control, message):
    with pytest.raises(ValueError, match=message):
        _record.write("step", {"a": {"median": 1.0}}, settings=settings, control=control, folder=tmp_path)


def test_committed_results_keep_to_the_form():
    for path in RESULTS:
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["benchmark"] and result["control"] in result["rows"], path.name
        assert "seed" in result["settings"], path.name
        assert {"python", "versions", "device", "commit"} <= result["environment"].keys(), path.name


def test_every_result_is_named_by_a_document():
    named = {name for text in TEXTS for name in re.findall(r"[`/]([a-z][a-z0-9_*]+)(?:\.json|\.png)?[`)]", text)}
    forgotten = [path.stem for path in RESULTS if not any(fnmatch(path.stem, name) for name in named)]
    assert not forgotten, "name them in the table of benchmarks/README.md"


def test_every_result_that_a_document_names_is_there():
    named = {name for text in TEXTS for name in re.findall(r"benchmarks/results/([\w*]+\.(?:json|png))", text)}
    assert len(named) > 10
    assert not [name for name in named if not any(ROOT.glob(f"benchmarks/results/{name}"))]
