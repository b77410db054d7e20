"""The commands that documents show can be run: options exist, and so do the modules, files and sessions they name."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from cggr_train.cli import app
from tests.support.documents import DOCUMENTS, ROOT

STARTS = r"(?:\$ )?(?:[A-Z_]+=\S+ )?((?:cggr|python|torchrun|accelerate) .+)"


def commands(path: Path) -> list[str]:
    """Commands in the fenced blocks without a language and in the inline code of a document."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:console|sh|bash)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    found = [match[1] for line in lines if (match := re.fullmatch(STARTS, line.strip()))]
    parts = [part for line in found for part in line.split(" && ")]
    return [part for part in parts if not re.search(r"…|\.\.\.|[.]$|\bNAME$|\bCOMMAND\b", part)]


CASES = [(path, command) for path in DOCUMENTS if path.name != "architecture.md" for command in commands(path)]


def check_cggr(words: list[str]) -> None:
    """Parse a ``cggr`` command with the command's own parser; nothing is run."""
    group = typer.main.get_command(app)
    name, *rest = words
    assert name in group.commands, f"there is no cggr {name}"
    group.commands[name].make_context(name, rest)


def check_benchmark(name: str, options: list[str], monkeypatch) -> None:
    """Hold the options of a benchmark's command to what its parser takes, those of subcommands included."""

    def stop(parser, *args, **kwargs):
        seen.append(parser)
        raise StopIteration

    assert (ROOT / f"benchmarks/{name}.py").is_file(), f"there is no benchmarks.{name}"
    try:
        script = importlib.import_module(f"benchmarks.{name}")
    except ImportError as error:
        pytest.skip(f"{name} needs what is not installed: {error}")
    seen: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(StopIteration):
        script.main()
    strings = {option for parser in below(seen[0]) for action in parser._actions for option in action.option_strings}
    choices = [set(action.choices) for action in seen[0]._actions if not action.option_strings and action.choices]
    if choices and options and not options[0].startswith("-"):
        assert options[0] in choices[0], f"benchmarks.{name} does not take {options[0]}"
    unknown = [word for word in options if word.startswith("--") and word.partition("=")[0] not in strings]
    assert not unknown, f"benchmarks.{name} has no {unknown}"


def below(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and those of its subcommands."""
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [inner for child in action.choices.values() for inner in below(child)]
    return found


@pytest.mark.parametrize(
    ("path", "command"), CASES, ids=[f"{path.relative_to(ROOT)}: {command}" for path, command in CASES]
)
def test_a_command_that_a_document_shows_can_be_run(path, command, monkeypatch):
    words = shlex.split(command, comments=True)
    for word in words:
        if re.match(r"(\./)?(examples|packages|benchmarks|tests)/", word) and "{" not in word:
            assert (ROOT / word.partition("[")[0]).exists(), f"there is no {word}"
    if words[0] == "cggr":
        check_cggr(words[1:])
    elif "cggr_train.cli" in words:
        check_cggr(words[words.index("cggr_train.cli") + 1 :])
    elif words[:2] == ["python", "-m"] and words[2].startswith("benchmarks."):
        check_benchmark(words[2].removeprefix("benchmarks."), words[3:], monkeypatch)
    elif words[:2] == ["python", "-m"]:
        assert words[2] in {"pip", "nox", "pytest", "build", "torch.utils.collect_env"} or importlib.util.find_spec(
            words[2]
        ), f"there is no module {words[2]}"


def test_enough_commands_are_found():
    shown = [command for _, command in CASES]
    assert len(shown) > 80
    assert sum(command.startswith("cggr ") for command in shown) > 25
    assert any("cggr_train.cli" in command for command in shown)


@pytest.mark.parametrize(
    ("command", "seen"),
    [
        ("study data.jsonl --no-such-option 3", "No such option"),
        ("trian data.jsonl", "there is no cggr trian"),
        ("train --steps many", "valid int"),
    ],
)
def test_a_wrong_command_is_seen(command, seen):
    with pytest.raises(Exception, match=seen):  # of click, or of the copy that typer has
        check_cggr(command.split())


def test_a_wrong_benchmark_is_seen(monkeypatch):
    with pytest.raises(AssertionError, match="has no"):
        check_benchmark("step_time", ["1b", "--no-such-option"], monkeypatch)
