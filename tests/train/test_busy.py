import io
from threading import Event

import pytest
from rich.console import Console

from cggr_train import busy as busy_module
from cggr_train.busy import busy


class Screen(io.StringIO):
    """Text written to it; ``three`` is set once three signs of life have been written."""

    def __init__(self):
        super().__init__()
        self.three = Event()

    def write(self, text):
        written = super().write(text)
        if self.getvalue().count(" s …") >= 3:
            self.three.set()
        return written


def test_a_terminal_sees_the_seconds_go_by(monkeypatch):
    monkeypatch.setattr(busy_module, "EVERY", 0.001)
    screen = Screen()
    with busy("loading a model", Console(file=screen, force_terminal=True, width=20)):
        assert screen.three.wait(10)
    shown = screen.getvalue()
    assert shown.startswith("loading a model … 0 s … 0 s … 0 s …")
    assert shown.endswith("\n") and shown.count("\n") == 1


def test_a_line_is_ended_when_what_it_announces_fails():
    screen = io.StringIO()
    with pytest.raises(OSError, match="gone"), busy("loading", Console(file=screen, force_terminal=True)):
        raise OSError("gone")
    assert screen.getvalue() == "loading …\n"


def test_a_file_gets_one_line_at_once():
    screen = io.StringIO()
    with busy("loading", Console(file=screen)):
        assert screen.getvalue() == "loading …\n"
    assert screen.getvalue() == "loading …\n"
