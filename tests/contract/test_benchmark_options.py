"""Every benchmark takes ``--seconds`` and reports what it has by then."""

import argparse
import importlib
import time

import pytest
import torch

from benchmarks import _record
from tests.support.documents import ROOT

# They measure nothing.
DRAW = {"distributed_figures", "evidence", "study_figures", "trl_figures"}
SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "benchmarks").glob("[a-z]*.py")
    if "ArgumentParser(" in path.read_text(encoding="utf-8") and path.stem not in DRAW
)


class _ParserError(Exception):
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__("no argument is read")
        self.parser = parser


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_it(name, monkeypatch):
    def stop(parser, *args, **kwargs):
        raise _ParserError(parser)

    try:
        script = importlib.import_module(f"benchmarks.{name}")
    except ImportError as error:
        pytest.skip(f"{name} needs what is not installed: {error}")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(_ParserError) as stopped:
        script.main()
    assert "--seconds" in stopped.value.parser.format_help()


def test_rounds_end_with_the_time():
    calls = []
    rows = _record.measure_until(
        {"control": lambda: calls.append(0)}, control="control", deadline=time.monotonic() - 1, rounds=50, least=3
    )
    assert rows["control"]["samples"] == 3
    assert len(calls) == 3


def test_rounds_end_with_the_memory_after_a_whole_one():
    calls = []

    def last_fits_twice():
        calls.append(0)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    candidates = {"control": lambda: None, "other": last_fits_twice}
    asked = {"control": "control", "deadline": _record.deadline(None), "rounds": 5}
    rows = _record.measure_until(candidates, **asked)
    assert {name: row["samples"] for name, row in rows.items()} == {"control": 2, "other": 2}
    with pytest.raises(torch.OutOfMemoryError):
        _record.measure_until(candidates, **asked)


def test_a_deadline_of_no_seconds_given_never_comes():
    assert not _record.is_over(_record.deadline(None))
    assert _record.is_over(_record.deadline(0.0))
