"""Every benchmark takes ``--seconds`` and reports what it has by then."""

import argparse
import importlib
import time

import pytest

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


def test_a_deadline_of_no_seconds_given_never_comes():
    assert not _record.is_over(_record.deadline(None))
    assert _record.is_over(_record.deadline(0.0))
