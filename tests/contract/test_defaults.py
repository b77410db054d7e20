"""Defaults of a routed step are written only in cggr_core/settings.py; everything else reads them there."""

import ast
import dataclasses
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from cggr_core.settings import RoutingSettings

PACKAGES = Path(__file__).parents[2] / "packages"
# What else these settings are called, where there are several of them or little room.
OTHER_NAMES = {
    "gradient_mode": "gradient",
    "gradients": "gradient",
    "ratio": "min_tokens_ratio",
    "ratios": "min_tokens_ratio",
    "ratio_warmup_steps": "warmup_steps",
    "selections": "selection",
    "scorings": "scoring",
}
# torch's own convention; a seed that is not that of a selection alone; and cggr train's recording of whole updates.
OTHER_MEANINGS = {"ignore_index", "seed", "cuda_graph"}
SETTINGS = {field.name: field.default for field in dataclasses.fields(RoutingSettings)}


def written(tree: ast.AST) -> Iterator[tuple[int, str, object]]:
    """Line, name and value of every default that is a literal, of parameters and of dataclass fields."""
    for node in ast.walk(tree):
        pairs: list[tuple[str, ast.expr | None]] = []
        if isinstance(node, ast.arguments):
            by_place = [*node.posonlyargs, *node.args]
            pairs += [(a.arg, d) for a, d in zip(reversed(by_place), reversed(node.defaults), strict=False)]
            pairs += [(a.arg, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
        elif isinstance(node, ast.ClassDef):
            pairs += [
                (line.target.id, line.value)
                for line in node.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            ]
        for name, default in pairs:
            if default is None:
                continue
            try:
                value = ast.literal_eval(default)
            except ValueError:
                continue
            yield default.lineno, name, value[0] if isinstance(value, tuple) and value else value


@pytest.mark.parametrize("package", ["core", "moe", "train"])
def test_no_default_is_written_twice(package):
    """The command line is apart: its help must not wait for torch, and the next test is about it."""
    twice, read = [], 0
    for path in sorted((PACKAGES / f"cggr-{package}" / "src").rglob("*.py")):
        if (path.name == "settings.py" and package == "core") or path.parent.name == "commands":
            continue
        read += 1
        for line, name, value in written(ast.parse(path.read_text(encoding="utf-8"))):
            setting = OTHER_NAMES.get(name, name)
            if (
                setting in SETTINGS
                and setting not in OTHER_MEANINGS
                and value is not None
                and value == SETTINGS[setting]
            ):
                twice.append(f"{path.relative_to(PACKAGES)}:{line} {name} = {value!r}")
    assert read and not twice


@pytest.mark.parametrize("command", ["train", "study", "demo", "inspect"])
def test_the_options_of_commands_default_to_the_settings(command):
    parameters = inspect.signature(getattr(import_module(f"cggr_train.commands.{command}"), command)).parameters
    named = {OTHER_NAMES.get(name, name): parameter.default for name, parameter in parameters.items()}
    # None leaves it to what else is given: cggr train keeps the supervised tokens where prompts are masked.
    given = {name: default for name, default in named.items() if default is not None}
    shared = {name: default for name, default in given.items() if name in SETTINGS and name not in OTHER_MEANINGS}
    # A study's ratios are a list, written as text.
    assert {name: str(default) for name, default in shared.items()} == {name: str(SETTINGS[name]) for name in shared}
    assert "min_tokens_ratio" in shared


def test_the_reader_of_defaults_sees_each_form():
    source = """
def f(a, gradient="kv", *, ratio=0.25, engine=None): ...
class C:
    ratios: tuple[float, ...] = (0.25,)
    scoring: str = RoutingSettings.scoring
"""
    found = {(name, value) for _, name, value in written(ast.parse(source)) if value is not None}
    assert found == {("gradient", "kv"), ("ratio", 0.25), ("ratios", 0.25)}
