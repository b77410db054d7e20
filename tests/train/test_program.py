import sys

import pytest

from cggr_train.program import program


@pytest.mark.parametrize(
    ("path", "named"),
    [
        (".nox/demo/bin/cggr", ".nox/demo/bin/cggr"),
        ("/usr/local/bin/cggr", "cggr"),
        ("packages/cggr_train/cli.py", "cggr"),
        ("cggr.exe", "cggr.exe"),
    ],
)
def test_a_command_that_the_shell_may_not_find_is_named_by_its_path(monkeypatch, tmp_path, path, named):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / path), "demo"])
    assert program().replace("\\", "/") == named
