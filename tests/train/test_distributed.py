"""Two processes train as one does, through the Trainer and through ``cggr train``; real processes, gloo."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from cggr_train.checkpoint import latest_checkpoint
from cggr_train.cli import app
from cggr_train.errors import InputError, RunError
from cggr_train.presets import load_model
from cggr_train.ranks import ALONE, Ranks, joined_ranks
from tests.support.commands import small_data
from tests.support.launchers import environment, finish, launched
from tests.support.trainer_worker import SETTINGS, compare, resume, run
from tests.support.two_ranks import run_on_two_ranks

SMALL = ["--config", "nano", "--vocab-size", "300", "--length", "32", "--batch-size", "4", "--heldout-fraction", "0.2",
         "--device", "cpu", "--precision", "float32"]  # fmt: skip
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def here(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small_data(tmp_path)


def test_the_trainer_on_two_ranks_is_the_trainer_on_one(tmp_path):
    for name in SETTINGS:
        _, found = run(name, tmp_path / "alone", per_device_train_batch_size=4)
        torch.save(found, tmp_path / f"{name}.pt")
    run_on_two_ranks(compare, tmp_path, folder=tmp_path)


def test_the_trainer_resumes_on_two_ranks(tmp_path):
    run_on_two_ranks(resume, tmp_path / "run", folder=tmp_path)


def test_cggr_train_under_accelerate_launch_is_cggr_train_on_one_rank(tmp_path, data):
    """Two ranks; torchrun starts those of the test of Ctrl-C."""
    command = ["train", data, *SMALL, "--steps", 4, "--accumulate", 2, "--log-every", 1, "--eval-every", 2, "--out"]
    here(*command, tmp_path / "one")
    done = finish(launched("accelerate", 2, "-m", "cggr_train.cli", *command, tmp_path / "two"), **NO_GPU)
    assert done.stdout.count("done: 4 steps") == 1, "rank 0 alone speaks"
    one, two = (dict(load_model(str(latest_checkpoint(tmp_path / name / "checkpoints"))).named_parameters())
                for name in ("one", "two"))  # fmt: skip
    assert all((two[name] - parameter).abs().max() <= 1e-5 for name, parameter in one.items())
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]  # fmt: skip
    assert len(logs[0]) == len(logs[1])
    for alone, together in zip(*logs, strict=True):
        for key in ("step", "tokens", "event"):
            assert together[key] == alone[key]
        for key in {"loss", "heldout_loss"} & alone.keys():
            assert together[key] == pytest.approx(alone[key], rel=1e-5)
    # Goes on, on one process, where two have stopped.
    assert "done: 5 steps" in here("train", "--resume", tmp_path / "two", "--steps", 5)


@pytest.mark.skipif(os.name != "posix", reason="process groups and their signals are POSIX's")
def test_ctrl_c_in_a_terminal_saves_and_stops_every_rank(tmp_path, data):
    out = tmp_path / "run"
    command = launched(
        "torchrun", 2, "-m", "cggr_train.cli", "train", data, *SMALL, "--steps", 100_000, "--log-every", 1, "--out", out
    )
    # A terminal's Ctrl-C reaches the launcher and both ranks; the launcher then sends the ranks SIGTERM as well.
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env=environment(**NO_GPU), start_new_session=True) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("step 3 "):
                os.killpg(process.pid, signal.SIGINT)
                break
        output, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "continue with: cggr train --resume" in output, errors
    (checkpoint,) = (out / "checkpoints").iterdir()
    assert int(checkpoint.name.removeprefix("step-")) >= 3
    assert (checkpoint / "training_state.json").exists()


class TestRanks:
    def test_one_process_is_its_own_world(self, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        with joined_ranks("cpu", batch_size=3) as (ranks, device):
            assert ranks == ALONE
            assert device.type == "cpu"
        assert ranks.main and ranks.rows(3) == slice(0, 3)
        assert ranks.agree(True, 2.5) == (True, 2.5)
        assert ranks.on_rank_zero(lambda: 7) == 7

    def test_rows_that_cannot_be_shared_are_refused(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with (
            pytest.raises(InputError, match="--batch-size must be a multiple of the 2 processes, got 3"),
            joined_ranks("cpu", batch_size=3),
        ):
            pass

    def test_an_error_on_rank_0_ends_all(self, monkeypatch):
        def fail():
            raise OSError("full")

        monkeypatch.setattr(Ranks, "agree", lambda self, any_rank, largest: (True, largest))
        with pytest.raises(OSError, match="full"):
            Ranks(0, 2).on_rank_zero(fail)
        with pytest.raises(RunError, match="rank 1 stopped because rank 0 failed"):
            Ranks(1, 2).on_rank_zero(fail)
