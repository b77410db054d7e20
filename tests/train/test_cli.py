import json
import os

import pytest
from typer.testing import CliRunner

from cggr_train import __version__, cli
from cggr_train.cli import app
from cggr_train.settings import TrainSettings

runner = CliRunner()
SMALL = ["--config", "nano", "--vocab-size", "300", "--length", "32", "--batch-size", "2", "--method", "standard"]


def cggr(*arguments):
    return runner.invoke(app, list(map(str, arguments)), catch_exceptions=False)


def test_help_and_version():
    assert f"cggr-train {__version__}" in cggr("--version").output
    for arguments in (["--help"], *([name, "--help"] for name in ("train", "study", "inspect", "demo", "doctor"))):
        result = cggr(*arguments)
        assert result.exit_code == 0
        assert "Usage" in result.output


@pytest.mark.parametrize(("given", "then"), [(None, "passive"), ("active", "active")])
def test_waiting_threads_sleep_unless_told_otherwise(monkeypatch, given, then):
    seen = []
    monkeypatch.setattr(cli, "app", lambda: seen.append(os.environ["OMP_WAIT_POLICY"]))
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    cli.main()
    assert seen == [then]


def test_help_names_every_choice(monkeypatch):
    from cggr_core.settings import SCORINGS, SELECTIONS

    monkeypatch.setenv("COLUMNS", "400")
    for command in ("train", "study", "demo"):
        shown = cggr(command, "--help").output
        for name in (*SELECTIONS, *(set(SCORINGS) - {"excess"})):
            assert name in shown, (command, name)
    shown = cggr("study", "--help").output.replace("\n", "")
    assert "the controls: standard training, with gradient checkpointing, with a batch of" in shown, (
        "broken where the terminal ends, not where the source does"
    )


@pytest.mark.parametrize("command", [["train"], ["study"], ["inspect", "--model", "none", "--text", "a b"]])
def test_a_command_says_at_once_that_it_is_loading(monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    result = cggr(*command)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"cggr {command[0]}: loading PyTorch and transformers …\n")
    assert not result.stdout
    monkeypatch.setenv("RANK", "1")
    assert "loading" not in cggr(*command).stderr, "one line from all processes of torchrun"


def test_train_then_resume(tmp_path, data_files):
    out = tmp_path / "run"
    result = cggr("train", *data_files, *SMALL, "--steps", 2, "--out", out)
    assert result.exit_code == 0
    assert "done: 2 steps, held-out loss" in result.output
    result = cggr("train", "--resume", out, "--steps", 3)
    assert result.exit_code == 0
    assert "resuming" in result.output
    assert "done: 3 steps" in result.output


@pytest.mark.parametrize(
    ("given", "selection"),
    [([], "supervised"), (["--ratio", "0.5"], "stratified"), (["--gradient", "sequence"], "stratified"),
     (["--selection", "random"], "random")],
)  # fmt: skip
def test_masked_prompts_are_context_and_every_answer_is_learned(tmp_path, given, selection):
    data = tmp_path / "data.jsonl"
    lines = [{"text": f"what is {n} + {n}?", "a": f"it is {2 * n}"} for n in range(40)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    small = ["--config", "nano", "--vocab-size", "300", "--length", "32", "--batch-size", "2", "--steps", 1]
    result = cggr("train", data, *small, "--answer", "a", "--heldout-fraction", 0.2, *given, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert TrainSettings.load(tmp_path / "run" / "settings.json").routing.selection == selection


def test_a_stopped_run_ends_with_130_and_says_how_to_go_on(tmp_path, data_files, monkeypatch):
    from cggr_train import run as module

    original = module.start_run
    monkeypatch.setattr(module, "start_run", lambda *arguments: original(*arguments)._replace(exit_code=130))
    result = cggr("train", *data_files, *SMALL, "--steps", 1, "--out", tmp_path / "run")
    assert result.exit_code == 130
    assert "continue with: cggr train --resume" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "1"], "no data files were given"),
        (["none.txt", "--steps", "1"], "the data file none.txt does not exist"),
        (["none.txt", "--seconds", "-1"], "--seconds must be positive"),
        (["none.txt", "--steps", "1", "--config", "nanoo"], "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = cggr("train", *SMALL, *arguments)
    assert result.exit_code == 2
    assert "error: " in result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("option", "name"), [(["--ratio", "0.5"], "--ratio"), (["a.txt"], "data files")])
def test_settings_cannot_go_with_resume(tmp_path, option, name):
    result = cggr("train", *option, "--resume", tmp_path)
    assert result.exit_code == 2
    assert f"{name} cannot be combined with --resume" in result.output
    result = cggr("study", *option, "--resume", tmp_path)
    assert result.exit_code == 2
    assert f"{name} cannot be combined with --resume: a study continues with the settings" in result.output


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)],
)
def test_other_ends(tmp_path, data_files, monkeypatch, error, code):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("cggr_train.run.start_run", fail)
    result = cggr("train", *data_files, *SMALL, "--steps", 1, "--out", tmp_path / "run")
    assert result.exit_code == code
    assert "Traceback" not in result.output
    assert ("error: the disk is full" in result.output) == isinstance(error, OSError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.txt"], "give the length of the standard run with either --steps or --seconds"),
        (["none.txt", "--steps", "1", "--ratio", "a,1"], "--ratio must be numbers separated by commas, got 'a,1'"),
        (["none.txt", "--steps", "1", "--equal", "epochs"], "--equal must be tokens, time or both, got 'epochs'"),
        (["none.txt", "--steps", "1"], "the data file none.txt does not exist"),
        (["bad.jsonl", "--steps", "1"], "bad.jsonl, line 2: not JSON"),
        (["empty.jsonl", "--steps", "1"], "hold no text"),
    ],
)
def test_bad_input_of_a_study_is_one_line_and_exit_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": \n')
    (tmp_path / "empty.jsonl").write_text("")
    result = cggr("study", "--config", "nano", "--vocab-size", "300", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "cggr-study").exists()


@pytest.mark.parametrize(
    ("arguments", "selections"),
    [
        ([], ("stratified",)),
        (["--answer", "a"], ("supervised", "stratified")),
        (["--messages", "m"], ("supervised", "stratified")),
        (["--answer", "a", "--ratio", "0.5"], ("stratified",)),
        (["--answer", "a", "--gradient", "kv,sequence"], ("stratified",)),
        (["--answer", "a", "--selection", "topk"], ("topk",)),
    ],
)
def test_a_study_of_masked_prompts_has_the_selection_that_training_defaults_to(monkeypatch, arguments, selections):
    asked = []

    def start(settings, *_):
        asked.append(settings.selections)
        return type("Result", (), {"exit_code": 0})()

    monkeypatch.setattr("cggr_train.study.start_study", start)
    assert cggr("study", "a.jsonl", "--steps", "1", "--config", "nano", *arguments).exit_code == 0
    assert asked == [selections]


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer, texts):
    from cggr_train.presets import build_config, build_model
    from cggr_train.tokenizer import train_tokenizer

    build_model(build_config("nano", vocab_size=len(tokenizer), length=64), seed=0).save_pretrained(tmp_path / "model")
    train_tokenizer(texts, vocab_size=400).save_pretrained(tmp_path / "other")
    for command in (
        ["study", tmp_path / "a.txt", "--steps", 1, "--out", tmp_path / "out"],
        ["inspect", "--text", "x y"],
    ):
        (tmp_path / "a.txt").write_text("text " * 100)
        result = cggr(*command, "--model", tmp_path / "model", "--tokenizer", tmp_path / "other")
        assert result.exit_code == 2
        assert "does not match the model: its ids go up to" in result.output


def test_inspect_writes_its_page(tmp_path, tokenizer):
    from cggr_train.presets import build_config, build_model

    build_model(build_config("nano", vocab_size=len(tokenizer), length=64), seed=0).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "page.html"
    result = cggr("inspect", "--model", tmp_path / "model", "--text", "def f(a):\n    return a\n", "--out", out)
    assert result.exit_code == 0
    assert f"tokens · page {out}" in result.output
    assert "Which tokens of this passage would be kept?" in out.read_text(encoding="utf-8")


def test_inspect_refuses_a_place_that_cannot_be_written_before_the_model_is_read(tmp_path):
    for out, message in ((tmp_path, "is a directory"), (tmp_path / "no" / "a.html", "does not exist")):
        result = cggr("inspect", "--model", "nowhere", "--text", "two words", "--out", out)
        assert result.exit_code == 2
        assert message in result.output


def test_doctor_reports():
    result = cggr("doctor")
    assert result.exit_code == 0
    assert "Operations" in result.output


def test_a_wrong_field_is_reported_before_the_model_is_read(tmp_path, monkeypatch):
    from cggr_train.presets import build_config, build_model

    build_model(build_config("nano", vocab_size=300, length=64), seed=0).save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"question": "a", "answer": "b"}\n')

    def read(path):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("cggr_train.prepare.load_tokenizer", read)
    monkeypatch.setattr("cggr_train.prepare.load_model", read)
    result = cggr(
        "train", tmp_path / "data.jsonl", "--model", tmp_path / "model", "--field", "question,other", "--steps", 1,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert result.exit_code == 2
    assert "'other' should be text, got no such key (it has question, answer" in " ".join(result.output.split())
