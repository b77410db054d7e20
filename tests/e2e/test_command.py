"""The `cggr` command as users start it: real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import Command, finish, interrupt_twice_after_step_five, small_data

SMALL = ["--config", "nano", "--vocab-size", "300", "--length", "32", "--batch-size", "2", "--heldout-fraction", "0.2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def cggr(*arguments):
    return [sys.executable, "-m", "cggr_train.cli", *map(str, arguments)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small_data(tmp_path)


def add_a_bad_line(data: Path) -> None:
    with data.open("a") as file:
        file.write('{"text": "cut\n')


def test_train_stops_cleanly_on_ctrl_c_and_resumes(tmp_path, data):
    """CGGR on JSON Lines, interrupted from outside, continued to its end."""
    out = tmp_path / "run"
    steps = 100_000
    add_a_bad_line(data)
    command = cggr("train", data, *SMALL, "--skip-bad", "--steps", steps, "--log-every", 1, "--out", out)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        before = ""
        for line in process.stdout:
            before += line
            if line.startswith("step 3 "):
                process.send_signal(signal.SIGINT)
                break
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "1 bad lines left out" in before
    assert "press Ctrl-C again to stop at once" in errors
    assert "Traceback" not in errors
    assert "continue with: cggr train --resume" in output
    (checkpoint,) = (out / "checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert 3 <= stopped < steps
    assert (out / "learning_curve.png").exists()

    done = finish("train", "--resume", out, "--steps", stopped + 2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"done: {stopped + 2} steps, held-out loss" in done.stdout
    assert done.stderr == "cggr train: loading PyTorch and transformers …\n"
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    trained = [record["step"] for record in logged if record["event"] == "train"]
    assert trained == sorted(set(trained))
    assert trained[-1] == stopped + 2


@pytest.mark.skipif(os.name != "posix", reason="terminals hang up on POSIX only")
def test_a_terminal_that_is_closed_saves_the_run(tmp_path, data):
    import pty

    out = tmp_path / "run"
    command = cggr("train", data, *SMALL, "--method", "standard", "--steps", 100_000, "--eval-every", 3, "--out", out)
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup has ignored where the tests run under it
        os.execve(command[0], command, ENVIRONMENT)
    shown = b""
    while b"held-out loss" not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) >= 3


@pytest.mark.skipif(os.name != "posix", reason="signals end a process so on POSIX only")
def test_a_second_ctrl_c_ends_it_at_once_and_loses_no_checkpoint(tmp_path, data):
    out = tmp_path / "run"
    arguments = ["train", data, *SMALL, "--steps", 8, "--save-every", 2, "--method", "standard", "--out", out]
    done = finish(*arguments, folder=tmp_path, before=interrupt_twice_after_step_five)
    assert done.returncode == -signal.SIGINT
    assert "still alive" not in done.stdout
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    done = finish("train", "--resume", out, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert "done: 8 steps" in done.stdout


def test_a_line_that_does_not_parse_is_named(tmp_path, data):
    add_a_bad_line(data)
    run = ("--steps", 1, "--method", "standard", "--out", tmp_path / "run")
    done = finish("train", data, *SMALL, *run, folder=tmp_path)
    assert done.returncode == 2
    assert f"error: {data}, line 61: not JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def records(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.skipif(os.name != "posix", reason="signals end a process so on POSIX only")
def test_a_study_stops_cleanly_on_ctrl_c_and_resumes(tmp_path, data):
    out = tmp_path / "study"
    settings = ["--steps", 12, "--seeds", 2, "--parallel", 1, "--draws", 0, "--calibration-seconds", 0.1]
    # Whether the control of equal memory fits depends on the process's resident memory, which varies from run to run.
    settings += ["--controls", "equal_cost,checkpointed"]
    start = ("study", data, *SMALL, *settings, "--equal", "tokens", "--device", "cpu", "--out", out)
    with Command(*start, folder=tmp_path) as study:
        for line in study.lines():
            if "held-out loss" in line:
                study.send_signal(signal.SIGINT)
                break
        done = study.finish()
    assert done.returncode == 130, done.stderr
    assert f"continue with: cggr study --resume {out}" in done.stdout
    assert "Traceback" not in done.stderr
    stopped = [(record["arm"], record["seed"]) for record in records(out) if record["event"] == "run"]
    assert 1 <= len(stopped) < 10

    done = finish("study", "--resume", out, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{len(stopped)} of 10 runs are done" in done.stdout
    runs = [(record["arm"], record["seed"]) for record in records(out) if record["event"] == "run"]
    assert runs[: len(stopped)] == stopped
    assert len(runs) == len(set(runs)) == 10
    names = {path.name for path in out.iterdir()}
    assert names == {
        "settings.json", "study.json", "arms.json", "tokenizer", "tokens", "results.jsonl", "runs", "report.html",
        ".lock",
    }  # fmt: skip
    assert [path.name for path in (out / "runs").iterdir()] == ["standard-seed0"]


def test_the_demo_is_a_study_of_four_methods(tmp_path):
    out = tmp_path / "demo"
    size = ["--config", "nano", "--vocab-size", 300, "--length", 32, "--batch-size", 4, "--characters", 100_000]
    done = finish("demo", "--out", out, "--seconds", 0.5, "--seeds", 1, *size, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for label in ("standard, batch 4", "standard, batch 2", "random 0.25, kv", "stratified 0.25 by"):
        assert label in done.stdout
    assert "Lowest held-out loss in the same time" in done.stdout
    runs = [record for record in records(out) if record["event"] == "run"]
    assert len(runs) == 4
    for run in runs:
        assert run["points"][-1]["heldout_loss"] < run["points"][0]["heldout_loss"]
    assert (out / "report.html").exists()
    assert "Found: " in done.stdout and str((out / "report.html").resolve()) in done.stdout
    assert "Which tokens of this passage would be kept?" in (out / "passage.html").read_text(encoding="utf-8")
