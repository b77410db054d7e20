"""The `cggr` command as users start it: real processes, real signals."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = ["--config", "nano", "--vocab-size", "300", "--length", "32", "--batch-size", "2", "--heldout-fraction", "0.2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def cggr(*arguments):
    return [sys.executable, "-m", "cggr_train.cli", *map(str, arguments)]


def finish(command, **options):
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **options)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    texts = (f"for n in range({n}):\n    print(n, {n} * n)\n" * 4 for n in range(60))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_train_stops_cleanly_on_ctrl_c_and_resumes(tmp_path, data):
    """CGGR on JSON Lines, interrupted from outside, continued to its end."""
    out = tmp_path / "run"
    steps = 100_000
    command = cggr("train", data, *SMALL, "--steps", steps, "--log-every", 1, "--out", out)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        for line in process.stdout:
            if line.startswith("step 3 "):
                process.send_signal(signal.SIGINT)
                break
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert "press Ctrl-C again to stop at once" in errors
    assert "Traceback" not in errors
    assert "continue with: cggr train --resume" in output
    (checkpoint,) = (out / "checkpoints").iterdir()
    stopped = int(checkpoint.name.removeprefix("step-"))
    assert 3 <= stopped < steps
    assert (out / "learning_curve.png").exists()

    done = finish(cggr("train", "--resume", out, "--steps", stopped + 2))
    assert done.returncode == 0, done.stderr
    assert f"done: {stopped + 2} steps, held-out loss" in done.stdout
    assert done.stderr == ""
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    trained = [record["step"] for record in logged if record["event"] == "train"]
    assert trained == sorted(set(trained))
    assert trained[-1] == stopped + 2


TWICE = """
import os, signal, sys
from cggr_train import cli, run

original = run._Run._after_step

def after_step(self, loss, rate):
    original(self, loss, rate)
    if self.progress.step == 5:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        print("still alive")

run._Run._after_step = after_step
sys.argv = ["cggr", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.skipif(os.name != "posix", reason="signals end a process so on POSIX only")
def test_a_second_ctrl_c_ends_it_at_once_and_loses_no_checkpoint(tmp_path, data):
    out = tmp_path / "run"
    arguments = ["train", data, *SMALL, "--steps", 8, "--save-every", 2, "--method", "standard", "--out", out]
    done = finish([sys.executable, "-c", TWICE, *map(str, arguments)])
    assert done.returncode == -signal.SIGINT
    assert "still alive" not in done.stdout
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    done = finish(cggr("train", "--resume", out))
    assert done.returncode == 0, done.stderr
    assert "resuming" in done.stdout
    assert "done: 8 steps" in done.stdout


def test_a_line_that_does_not_parse_is_named(tmp_path, data):
    with data.open("a") as file:
        file.write('{"text": "cut\n')
    arguments = ["train", data, *SMALL, "--steps", 1, "--method", "standard", "--out", tmp_path / "run"]
    done = finish(cggr(*arguments))
    assert done.returncode == 2
    assert f"error: {data}, line 61: not JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
    done = finish(cggr(*arguments, "--skip-bad"))
    assert done.returncode == 0, done.stderr
    assert "1 bad lines left out" in done.stdout


def test_the_demo_compares_four_runs_in_processes_of_their_own(tmp_path):
    out = tmp_path / "demo"
    size = ["--config", "nano", "--vocab-size", 400, "--length", 64, "--batch-size", 4, "--characters", 400_000]
    done = finish(cggr("demo", "--out", out, "--seconds", 1, *size))
    assert done.returncode == 0, done.stderr
    for name in ("standard", "half the batch", "random tokens", "CGGR"):
        assert name in done.stdout
    assert "Lowest held-out loss in the same time" in done.stdout
    results = json.loads((out / "results.json").read_text())["results"]
    assert len({result["peak_bytes"] for result in results}) > 1
    for result in results:
        assert result["steps"] >= 1
        assert result["heldout_loss"] < result["curve"][0]["heldout_loss"]
    names = {path.name for path in out.iterdir()}
    assert names == {"comparison.png", "demo.html", "results.json", "model", "tokens"}, "no leftovers of the runs"
